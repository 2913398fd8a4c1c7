"""Templates: finding schedule spaces, and rendering one variant to Python source."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from nsagen.codegen.space import ScheduleSpace
from nsagen.core.errors import BuildError, UnsupportedWorkloadError
from nsagen.core.paths import templates_dir
from nsagen.core.target import Target
from nsagen.core.workload import STATIC_PARAMS, Schedule, Workload, variant_name

_CODEGEN = Path(__file__).parent
_HELPER = re.compile(r"^from nsagen\.codegen(?:\.(\w+) import| import ([\w, ]+)$)", re.MULTILINE)
_INCLUDE = re.compile(r"""{%-?\s*(?:include|import|from)\s+["']([^"']+)["']""")


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
    name = f"nsagen_templates_{path.parent.name}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise BuildError(f"{path.name}: must be a Python file; it cannot be loaded")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.SPACES


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


def spaces_for(workload: Workload, target: Target) -> tuple[ScheduleSpace, ...]:
    """Every space that covers a workload on a target, the one to use by default first.

    Raises:
        UnsupportedWorkloadError: none does.
    """
    spaces = [
        space
        for space in spaces_of(workload.op, workload.pass_)
        if space.supports(workload) and space.runs_on(target)
    ]
    if not spaces:
        raise UnsupportedWorkloadError(
            f"{workload}: needs an algorithm that covers it on {target}; templates/{workload.op} "
            f"has {', '.join(s.algorithm for s in spaces_of(workload.op, workload.pass_))}"
        )
    return tuple(
        sorted(spaces, key=lambda space: (not space.preferred(workload, target), space.general))
    )


def default_schedule(workload: Workload, target: Target) -> Schedule:
    """The schedule to use where nothing was measured: of the first algorithm that has a valid one.

    Raises:
        UnsupportedWorkloadError: no algorithm covers the workload, or none fits the target.
    """
    reasons = []
    for space in spaces_for(workload, target):
        try:
            return space.default_schedule(workload, target)
        except UnsupportedWorkloadError as error:
            reasons.append(str(error))
    raise UnsupportedWorkloadError("\n".join(reasons))


@functools.cache
def template_hash(template: str) -> str:
    """SHA-256 over a template, what it includes, and the spaces beside it with their helpers."""
    digest = hashlib.sha256()
    pending, seen = [template], set[str]()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            text = (templates_dir() / name).read_text(encoding="utf-8")
        except OSError as error:
            raise BuildError(
                f"templates/{name}: a template must be readable; got {error.strerror}; "
                "restore it, or install nsagen again"
            ) from None
        digest.update(f"{name}\0{text}\0".encode())
        pending += sorted(_INCLUDE.findall(text))
    helpers = set[str]()
    for path in sorted((templates_dir() / template).parent.glob("space*.py")):
        text = path.read_text(encoding="utf-8")
        digest.update(text.encode())
        for one, several in _HELPER.findall(text):
            helpers.update([one] if one else re.findall(r"\w+", several))
    for name in sorted(helpers - {"space", "target"}):  # those two hold no arithmetic of a kernel
        digest.update((_CODEGEN / f"{name}.py").read_bytes())
    return digest.hexdigest()


def kernel_name(workload: Workload, schedule: Schedule) -> str:
    """The name of the variant's file and main kernel."""
    space = space_for(workload, schedule.algorithm)
    return variant_name(workload, schedule, template_hash(space.template))


def render(workload: Workload, schedule: Schedule, header: str) -> str:
    """The Python source of one variant, unformatted.

    Args:
        header: comment lines for the file's top.

    Raises:
        BuildError: the template uses an undefined name, or makes invalid Python.
    """
    space = space_for(workload, schedule.algorithm)
    context: dict[str, Any] = {
        **workload.named(),
        **dict(schedule.knobs),
        **space.derive(workload, schedule),
        "dtype": workload.dtype,
        "kernel_name": kernel_name(workload, schedule),
        "header": header,
    }
    try:
        source = environment().get_template(space.template).render(context)
        ast.parse(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f"templates/{space.template}" + (f":{line}" if line else "")
        raise BuildError(f"{where}: every name must be defined; {error}; for {workload}") from error
    except SyntaxError as error:
        raise BuildError(
            f"templates/{space.template}: must render to valid Python; "
            f"line {error.lineno} of the output: {error.msg}: {(error.text or '').strip()}"
        ) from error
    return source
