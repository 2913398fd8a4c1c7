"""Compiles every variant of a package in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nsagen.codegen.build import ResourceRows
from nsagen.codegen.plan import Variant
from nsagen.core.errors import BuildError
from nsagen.core.releases import installed_release
from nsagen.core.target import parse_target
from nsagen.core.worker import map_in_workers
from nsagen.core.workload import Workload

Progress = Callable[[str, int, int], None]
"""Called with (what was done, how many are done, how many in all)."""

COMPILE_LIMIT_S = 900.0
"""Seconds that a variant may take to compile for a target."""


def compile_variants(
    kernels: Path,
    variants: tuple[Variant, ...],
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ResourceRows:
    """Compile every changed variant for each of its targets in worker processes.

    Variants that do not run with the installed Triton are left out.

    Raises:
        BuildError: names each variant that fails, spills badly or exceeds shared memory.
    """
    release = installed_release()
    variants = tuple(v for v in variants if v.runs_with(release))
    work = [(v, target) for v in variants for target in v.targets]
    calls = [
        (kernels / f"{v.name}.py", v.workload, target, v.measured(target)) for v, target in work
    ]
    resources: ResourceRows = {variant.name: [] for variant in variants}
    problems: list[str] = []
    compiled = map_in_workers(_compile_one, calls, jobs or os.cpu_count() or 1, COMPILE_LIMIT_S)
    with closing(compiled) as found:
        for done, ((variant, target), (rows, wrong)) in enumerate(zip(work, found, strict=True), 1):
            resources[variant.name] += rows
            problems += wrong
            if progress:
                progress(f"{variant.name} for {target}", done, len(work))
    if problems:
        raise BuildError("build: every variant must compile and fit:\n  " + "\n  ".join(problems))
    return resources


def _compile_one(
    path: Path, workload: Workload, target_name: str, measured: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    from nsagen.aot.cached import compiled_resources  # may import torch and triton

    target = parse_target(target_name)
    try:
        kernels = compiled_resources(path, workload, target)
    except BuildError as error:
        return [], [str(error)]
    problems = [
        f"{path.stem}: kernel {kernel.kernel} on {target}: {problem}"
        for kernel in kernels
        for problem in kernel.problems(target, measured=measured)
    ]
    return [asdict(kernel) for kernel in kernels], problems
