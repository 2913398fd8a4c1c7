"""Compiles what calls are about to launch, in worker processes, before the first of them waits.

Triton compiles a kernel at its first launch, one after another. `planned_launches` makes calls
without launching anything, and `compile_launches` compiles what they would have launched side by
side. A later launch finds it in Triton's cache on disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsagen.core.compiler import compiler_name
from nsagen.core.compiler_cache import compiler_cache
from nsagen.core.errors import BuildError
from nsagen.core.files import replace_file
from nsagen.core.target import parse_target
from nsagen.core.worker import map_in_workers
from nsagen.ops._op import recording_launches

LIMIT_S = 300.0
"""Seconds that the kernels of a file may take to compile."""

MOST_JOBS = 16

Launches = Mapping[tuple[Path, str], Sequence[tuple[Any, ...]]]
"""By a kernel's file and the name of its launch function, the arguments of each, without data."""

Progress = Callable[[str, int, int], None]
"""Called with (what was done, how many are done, how many in all)."""


class _Plan:
    """Stands in for the recorder of a call's launches: notes them and fills outputs with zeros."""

    def __init__(self) -> None:
        self.found: dict[tuple[Path, str], dict[str, tuple[Any, ...]]] = {}

    def allocated(self, tensor: Tensor) -> None:
        tensor.zero_()  # what comes later may index by it

    def applied(self, *_: Any) -> None:
        """PyTorch has computed it."""

    def run(self, launch: Any, args: Sequence[Any]) -> None:
        place = Path(launch.__code__.co_filename), launch.__name__
        without_data = tuple(_meta(arg) if isinstance(arg, Tensor) else arg for arg in args)
        self.found.setdefault(place, {}).setdefault(_looks(without_data), without_data)


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _looks(args: Sequence[Any]) -> str:
    each = [(a.dtype, *a.shape, *a.stride()) if isinstance(a, Tensor) else a for a in args]
    return repr(each)


def planned_launches(calls: Callable[[], object]) -> Launches:
    """What ops that a function calls in this thread would launch; nothing is launched.

    The ops' outputs are zeros, and what they write to stays as it is.
    """
    plan = _Plan()
    with recording_launches(plan):
        calls()
    return {place: tuple(several.values()) for place, several in plan.found.items()}


def compile_launches(
    launches: Launches, target: str, jobs: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Compile kernels into Triton's cache, unless an earlier call did.

    Args:
        target: as `target_of` names it.
        jobs: processes; a core each by default, `MOST_JOBS` at most.

    Returns:
        why kernels did not compile, a line each: their launches will say more.

    Raises:
        WorkerError: a process died, or took too long.
    """
    if not launches:
        return []
    done = compiler_cache() / f"nsagen-{_digest(launches, target)}"
    if done.exists():
        return []
    calls = [(*place, several, target) for place, several in launches.items()]
    jobs = jobs or min(os.cpu_count() or 1, MOST_JOBS)
    problems: list[str] = []
    with closing(map_in_workers(compile_file, calls, jobs, LIMIT_S)) as compiled:
        for count, (call, problem) in enumerate(zip(calls, compiled, strict=True), 1):
            problems += [problem] if problem else []
            if progress:
                progress(call[0].stem.partition("__")[0], count, len(calls))
    if not problems:
        with suppress(OSError):
            replace_file(done, "")
    return problems


def compile_file(
    path: Path, name: str, several: Sequence[tuple[Any, ...]], target_name: str
) -> str:
    """Compile what calls of a file's launch function launch; returns what went wrong, or ""."""
    from nsagen.aot.compile import compile_launch, recording
    from nsagen.core.importing import import_file

    target, module = parse_target(target_name), import_file(path)
    try:
        with recording(module) as calls:
            for args in several:
                getattr(module, name)(*args)
        for call in calls:
            compile_launch(call, target, path.stem)
    except BuildError as error:
        return str(error)
    return ""


def _digest(launches: Launches, target: str) -> str:
    digest = hashlib.sha256(f"{target} {compiler_name()}".encode())
    for (path, name), several in sorted(launches.items()):
        looks = sorted(map(_looks, several))
        digest.update(f"{path} {name} {looks}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
