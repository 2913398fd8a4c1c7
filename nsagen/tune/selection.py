"""Which workloads and sizes a run covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from nsagen.codegen.plan import offered_together
from nsagen.codegen.template import spaces_of
from nsagen.core.errors import BuildError, InvalidInputError
from nsagen.core.packages import read_manifest, spec_of
from nsagen.core.paths import visible
from nsagen.core.releases import installed_release
from nsagen.core.target import Target
from nsagen.core.text import nearest
from nsagen.core.workload import Workload
from nsagen.spec import Spec, load_spec
from nsagen.tune.task import Task, tasks_of


@dataclass(frozen=True)
class Selection:
    """Which of a spec's workloads to tune, and at which sizes; empty: all, and the defaults.

    Attributes:
        params: name -> value that a workload's static parameter must have, or `none` if it must
            lack the parameter. Ops and passes whose workloads all lack it are not narrowed down.
    """

    ops: Sequence[str] = ()
    passes: Sequence[str] = ()
    seqlens: Sequence[int] = ()
    batches: Sequence[int] = ()
    kv_heads: int | None = None
    params: Mapping[str, str] = field(default_factory=dict)

    def tasks(self, specs: Sequence[Spec]) -> tuple[Task, ...]:
        """The tasks of several specs, each once.

        They include those of forced blocks once, which some targets run: see `tasks_on`.

        Raises:
            InvalidInputError: no spec has the op or pass.
        """
        every = (w for spec in specs for w in (*spec.workloads(), *chain(*spec.forced_once())))
        workloads = sorted({w for w in every if _has_template(w)})
        _check_known("--op", self.ops, {w.op for w in workloads})
        _check_known("--pass", self.passes, {w.pass_ for w in workloads})
        _check_known("--param", list(self.params), {n for w in workloads for n, _ in w.params})
        found = [
            w
            for w in workloads
            if (not self.ops or w.op in self.ops) and (not self.passes or w.pass_ in self.passes)
        ]
        for name, value in self.params.items():
            having = {(w.op, w.pass_) for w in workloads if _param(w, name) != _NONE}
            of_name = {_param(w, name) for w in workloads if (w.op, w.pass_) in having}
            _check_known(f"--param {name}", [value], of_name)
            found = [w for w in found if (w.op, w.pass_) not in having or _param(w, name) == value]
        # An index has a head for each key/value head, so it says how many there are.
        index_heads = {shape.index_heads for spec in specs for shape in spec.shapes}
        known = index_heads.pop() if len(index_heads) == 1 else 0
        topk = {w: max(spec.topk_of(w) for spec in specs) for w in found}
        heads = self.kv_heads or known or None
        return tasks_of(found, self.seqlens, self.batches, heads, topk)


_NONE = "none"
"""The value that `--param` takes for a parameter that a workload lacks."""


def _param(workload: Workload, name: str) -> str:
    return str(dict(workload.params).get(name, _NONE))


def tasks_on(tasks: Sequence[Task], specs: Sequence[Spec], target: Target) -> tuple[Task, ...]:
    """The tasks whose workloads calls run on a target, with the installed Triton.

    Raises:
        InvalidInputError: none of them does.
    """
    release = installed_release()
    offered = {w for s in specs for w in offered_together(s.forced_once(), target, release)}
    offered |= {w for spec in specs for w in spec.workloads()}
    found = tuple(task for task in tasks if task.workload in offered)
    if tasks and not found:
        raise InvalidInputError(
            f"tune: {target} must run one of the workloads; got {tasks[0].workload}, but calls run "
            "whole lists there; leave out --param local_blocks"
        )
    return found


def _has_template(workload: Workload) -> bool:
    try:
        spaces_of(workload.op, workload.pass_)
    except BuildError:
        return False
    return True


def _check_known(option: str, given: Sequence[str], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise InvalidInputError(
                f"tune: {option} must be one of {', '.join(sorted(known))}; got {name!r}; "
                f"{nearest(name, known, 'choose one that the spec has')}"
            )


def specs_of(name: str | None, generated: Path) -> tuple[Spec, ...]:
    """The named spec or, without a name, those from which the folder of packages was built.

    Raises:
        SpecError: the spec does not exist.
        InvalidInputError: no name, and no package in the folder.
    """
    if name is not None:
        return (load_spec(name),)
    folders = [path for path in visible(generated.glob("*")) if read_manifest(path) is not None]
    if not folders:
        raise InvalidInputError(
            f"tune: without a SPEC, {generated}/ must hold packages; got none; "
            "name a spec, such as: nsagen tune llama8b"
        )
    sources = {folder: spec_of(folder) for folder in folders}
    for folder, source in sources.items():
        if source is None:
            raise InvalidInputError(
                f"tune: without a SPEC, the spec of {folder} must be where it was; it is not; "
                "name a spec, such as: nsagen tune llama8b"
            )
    return tuple(load_spec(source) for source in sources.values() if source is not None)
