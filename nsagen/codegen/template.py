"""Templates: finds schedule spaces, renders a variant to Python source, and names it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from nsagen.codegen.fingerprint import source_fingerprint
from nsagen.codegen.space import ScheduleSpace
from nsagen.core.errors import BuildError, UnsupportedWorkloadError
from nsagen.core.importing import import_file
from nsagen.core.paths import templates_dir
from nsagen.core.releases import Release
from nsagen.core.target import Target
from nsagen.core.workload import STATIC_PARAMS, Schedule, Workload, variant_name


@functools.cache
def environment() -> jinja2.Environment:
    """The one Jinja environment: strict about undefined names, sandboxed, exact about space."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters["pyrepr"] = repr
    return env


@functools.cache
def spaces_of(op: str, pass_: str) -> tuple[ScheduleSpace, ...]:
    """The schedule spaces of an op's pass, preferred algorithm first.

    Raises:
        BuildError: the op has no template for the pass.
    """
    found: list[ScheduleSpace] = []
    for path in sorted((templates_dir() / op).glob("space*.py")):
        found += [s for s in _load_spaces(path) if s.op == op and s.pass_ == pass_]
    if not found:
        known = sorted({name for name, _ in STATIC_PARAMS})
        raise BuildError(
            f"templates/{op}: each op needs a schedule space for the passes asked of it; "
            f"found none for {pass_!r}; known ops: {', '.join(known)}"
        )
    return tuple(found)


def _load_spaces(path: Path) -> tuple[ScheduleSpace, ...]:
    return import_file(path).SPACES


def space_for(workload: Workload, algorithm: str | None = None) -> ScheduleSpace:
    """The space of the named algorithm, or the preferred one that supports the workload.

    Raises:
        UnsupportedWorkloadError: no algorithm of that name, or none that covers the workload.
    """
    spaces = spaces_of(workload.op, workload.pass_)
    for space in spaces:
        if algorithm in (None, space.algorithm) and space.supports(workload):
            return space
    raise UnsupportedWorkloadError(
        f"{workload}: needs an algorithm that covers it; "
        f"templates/{workload.op} has {', '.join(s.algorithm for s in spaces)}"
    )


def spaces_for(
    workload: Workload, target: Target, release: Release | None = None
) -> tuple[ScheduleSpace, ...]:
    """Every space that covers a workload on a target, the default choice first.

    Args:
        release: of Triton; None if the kernels may meet any.

    Raises:
        UnsupportedWorkloadError: no space does.
    """
    spaces = [
        space
        for space in spaces_of(workload.op, workload.pass_)
        if space.supports(workload) and space.runs_on(target) and space.runs_with(release)
    ]
    if not spaces:
        raise UnsupportedWorkloadError(
            f"{workload}: needs an algorithm that covers it on {target}; templates/{workload.op} "
            f"has {', '.join(s.algorithm for s in spaces_of(workload.op, workload.pass_))}"
        )
    return tuple(
        sorted(spaces, key=lambda space: (not space.preferred(workload, target), space.general))
    )


def is_offered(workload: Workload, target: Target, release: Release | None = None) -> bool:
    """Whether an algorithm that covers a workload on a target is preferred for it.

    Workloads that calls can do without are used only where this holds; see
    `nsagen.ops.forced_blocks`.
    """
    try:
        spaces = spaces_for(workload, target, release)
    except UnsupportedWorkloadError:
        return False
    return spaces[0].preferred(workload, target)


def default_schedule(
    workload: Workload, target: Target, release: Release | None = None
) -> Schedule:
    """The schedule to use when nothing was measured: of the first algorithm with a valid one.

    Args:
        release: of Triton; None if the kernel may meet any; see also `fallback_schedule`.

    Raises:
        UnsupportedWorkloadError: no algorithm covers the workload, or none fits the target.
    """
    return _first_valid(spaces_for(workload, target, release), workload, target)


def fallback_schedule(workload: Workload, target: Target) -> Schedule:
    """As `default_schedule`, among the algorithms that run with every Triton."""
    every = [space for space in spaces_for(workload, target) if space.triton is None]
    return _first_valid(every, workload, target)


def _first_valid(spaces: Iterable[ScheduleSpace], workload: Workload, target: Target) -> Schedule:
    reasons = []
    for space in spaces:
        try:
            return space.default_schedule(workload, target)
        except UnsupportedWorkloadError as error:
            reasons.append(str(error))
    raise UnsupportedWorkloadError(
        "\n".join(reasons)
        or f"{workload}: needs an algorithm that covers it on {target} with every Triton"
    )


@dataclass(frozen=True)
class Kernel:
    """A rendered variant without its header.

    Attributes:
        name: of the variant's file and main kernel.
        fingerprint: of its code; see `nsagen.codegen.fingerprint`.
    """

    name: str
    fingerprint: str
    _source: str

    def text(self, header: str) -> str:
        """The Python source, unformatted, with comment lines at the top of the file."""
        return self._source.replace(_NAME, self.name).replace(_HEADER, header)


_NAME = "name_of_the_kernel"
_HEADER = "# The header comes here."


@functools.lru_cache(maxsize=4096)  # all shipped specs have half of it; a search has no end
def rendered(workload: Workload, schedule: Schedule) -> Kernel:
    """A variant's code, and the name derived from it.

    Raises:
        BuildError: the template uses an undefined name, or makes invalid Python.
        UnsupportedWorkloadError: no algorithm of the schedule's name covers the workload.
    """
    space = space_for(workload, schedule.algorithm)
    context: dict[str, Any] = {
        **workload.named(),
        **dict(schedule.knobs),
        **space.derive(workload, schedule),
        "dtype": workload.dtype,
        "triton_releases": space.triton,
        "kernel_name": _NAME,
        "header": _HEADER,
    }
    try:
        source = environment().get_template(space.template).render(context)
        fingerprint = source_fingerprint(source, _NAME)
    except (jinja2.TemplateNotFound, OSError) as error:
        name, said = space.template, "No such file"
        if isinstance(error, jinja2.TemplateNotFound):
            name = error.name
        else:
            said = error.strerror
        raise BuildError(
            f"templates/{name}: a template must be readable; got {said}; "
            "restore it, or install nsagen again"
        ) from error
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f"templates/{space.template}" + (f":{line}" if line else "")
        raise BuildError(f"{where}: every name must be defined; {error}; for {workload}") from error
    except SyntaxError as error:
        raise BuildError(
            f"templates/{space.template}: must render to valid Python; "
            f"line {error.lineno} of the output: {error.msg}: {(error.text or '').strip()}"
        ) from error
    return Kernel(variant_name(workload, schedule, fingerprint), fingerprint, source)


def kernel_name(workload: Workload, schedule: Schedule) -> str:
    """The name of the variant's file and main kernel; raises as `rendered` does."""
    return rendered(workload, schedule).name


def kernel_fingerprint(workload: Workload, schedule: Schedule) -> str:
    """16 hex digits over the code of the variant; raises as `rendered` does."""
    return rendered(workload, schedule).fingerprint


def render(workload: Workload, schedule: Schedule, header: str) -> str:
    """The Python source of one variant, unformatted; raises as `rendered` does.

    Args:
        header: comment lines for the file's top.
    """
    return rendered(workload, schedule).text(header)


def forget() -> None:
    """Read templates and spaces again: they were edited or moved."""
    for cached in (environment, spaces_of, rendered):
        cached.cache_clear()
