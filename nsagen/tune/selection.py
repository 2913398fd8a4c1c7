"""Which workloads and sizes a run covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nsagen.codegen.template import spaces_of
from nsagen.core.errors import BuildError, InvalidInputError
from nsagen.core.packages import read_manifest, spec_of
from nsagen.core.paths import visible
from nsagen.core.workload import Workload
from nsagen.spec import Spec, load_spec
from nsagen.tune.task import Task, tasks_of


@dataclass(frozen=True)
class Selection:
    """Which of a spec's workloads to tune, and at which sizes; empty: all, and the defaults.

    Attributes:
        params: name -> value that a workload's static parameter must have, if it has one.
    """

    ops: Sequence[str] = ()
    passes: Sequence[str] = ()
    seqlens: Sequence[int] = ()
    batches: Sequence[int] = ()
    kv_heads: int | None = None
    params: Mapping[str, str] = field(default_factory=dict)

    def tasks(self, specs: Sequence[Spec]) -> tuple[Task, ...]:
        """The tasks of several specs, each once.

        Raises:
            InvalidInputError: no spec has the op or pass.
        """
        workloads = sorted({w for spec in specs for w in spec.workloads() if _has_template(w)})
        _check_known("--op", self.ops, {w.op for w in workloads})
        _check_known("--pass", self.passes, {w.pass_ for w in workloads})
        _check_known("--param", list(self.params), {n for w in workloads for n, _ in w.params})
        for name, value in self.params.items():
            of_name = {str(dict(w.params)[name]) for w in workloads if name in dict(w.params)}
            _check_known(f"--param {name}", [value], of_name)
        chosen = [
            w
            for w in workloads
            if (not self.ops or w.op in self.ops)
            and (not self.passes or w.pass_ in self.passes)
            and all(
                str(dict(w.params).get(name, value)) == value for name, value in self.params.items()
            )
        ]
        return tasks_of(chosen, self.seqlens, self.batches, self.kv_heads)


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
                "choose one that the spec has"
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
