"""`nsagen build`: render a spec's package, write it safely, and tell whether one is stale."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nsagen.codegen.package import Origin, manifest_text, package_files, variant_header
from nsagen.codegen.plan import DEFAULT_PROVENANCE, Variant, plan_variants
from nsagen.codegen.target import parse_target
from nsagen.codegen.template import default_schedule, kernel_name, render
from nsagen.errors import BuildError
from nsagen.spec import Spec
from nsagen.workload import Workload

Progress = Callable[[str, int, int], None]
"""Called with (what was done, how many are done, how many in all)."""


@dataclass(frozen=True)
class BuildResult:
    """What a build made.

    Attributes:
        folder: the package's folder.
        variants: the kernels, sorted by name.
        written: files that changed, relative to the folder.
        removed: files that no longer belong to the package.
        resources: variant name -> one dict a kernel and target; empty unless compiled.
    """

    folder: Path
    variants: tuple[Variant, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    resources: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Stale:
    """A file of a generated package that is not what a build would write.

    Attributes:
        path: relative to the package's folder.
        state: "missing", "edited" or "orphaned".
    """

    path: str
    state: str


def build(
    spec: Spec,
    out_dir: Path,
    *,
    compile_targets: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Render `spec` into `out_dir/<name>`; with `compile_targets`, compile every variant too.

    Files whose text is unchanged are not touched. A file is replaced in one step, kernels
    before the table that names them, so that a reader never imports half a package.

    Raises:
        BuildError: a template fails, or a compiled variant must not ship; the text names it.
    """
    variants, origin, files = _render(spec)
    folder = out_dir / spec.name
    with _locked(out_dir, spec.name):
        resources = _kept_resources(folder, variants)
        written = [path for path in _write_order(files) if _replace(folder / path, files[path])]
        if compile_targets:
            resources = compile_variants(folder / "kernels", variants, jobs, progress)
        manifest = manifest_text(variants, origin, files, resources)
        if _replace(folder / "manifest.json", manifest):
            written.append("manifest.json")
        removed = _orphans(folder, files)
        for path in removed:
            (folder / path).unlink()
    return BuildResult(folder, variants, tuple(written), tuple(removed), resources)


def check(spec: Spec, out_dir: Path) -> list[Stale]:
    """Each file of `out_dir/<name>` that differs from what `build` would write now."""
    variants, origin, files = _render(spec)
    folder = out_dir / spec.name
    manifest = manifest_text(variants, origin, files, _kept_resources(folder, variants))
    stale = []
    for path, text in sorted({**files, "manifest.json": manifest}.items()):
        if not (folder / path).is_file():
            stale.append(Stale(path, "missing"))
        elif (folder / path).read_text(encoding="utf-8") != text:
            stale.append(Stale(path, "edited"))
    return stale + [Stale(path, "orphaned") for path in _orphans(folder, files)]


def build_variant(workload: Workload, target: str, out_dir: Path) -> Path:
    """Render one workload with its target's default schedule to `out_dir/<name>.py`.

    Safe under concurrent calls: the file appears whole or not at all.
    """
    schedule = default_schedule(workload, parse_target(target))
    variant = Variant(
        kernel_name(workload, schedule), workload, schedule, (target,), DEFAULT_PROVENANCE
    )
    path = out_dir / f"{variant.name}.py"
    origin = Origin("user cache", "(built when a call needed it)", "")
    _replace(path, render(workload, schedule, variant_header(variant, origin)))
    return path


def _render(spec: Spec) -> tuple[tuple[Variant, ...], Origin, dict[str, str]]:
    variants = plan_variants(spec.workloads(), spec.targets)
    origin = Origin(spec.name, spec.label, spec.sha256)
    return variants, origin, package_files(variants, origin)


def compile_variants(
    kernels: Path,
    variants: tuple[Variant, ...],
    jobs: int | None = None,
    progress: Progress | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Compile every variant for each of its targets in worker processes.

    Raises:
        BuildError: names each variant that fails, spills badly or exceeds shared memory.
    """
    work = [(v, target) for v in variants for target in v.targets]
    resources: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    problems: list[str] = []
    workers = jobs or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs_ = [
            pool.submit(_compile_one, kernels / f"{v.name}.py", v.workload, target)
            for v, target in work
        ]
        for done, ((variant, target), job) in enumerate(zip(work, jobs_, strict=True), 1):
            rows, wrong = job.result()
            resources[variant.name] += rows
            problems += wrong
            if progress:
                progress(f"{variant.name} for {target}", done, len(work))
    if problems:
        raise BuildError("build: every variant must compile and fit:\n  " + "\n  ".join(problems))
    return resources


def _compile_one(
    path: Path, workload: Workload, target_name: str
) -> tuple[list[dict[str, Any]], list[str]]:
    from nsagen.codegen.compile import compile_variant  # torch and triton, in the worker only

    target = parse_target(target_name)
    try:
        kernels = compile_variant(path, workload, target)
    except BuildError as error:
        return [], [str(error)]
    problems = [
        f"{path.stem}: kernel {kernel.kernel} on {target}: {problem}"
        for kernel in kernels
        for problem in kernel.problems(target)
    ]
    return [asdict(kernel) for kernel in kernels], problems


def _kept_resources(folder: Path, variants: tuple[Variant, ...]) -> dict[str, list[dict[str, Any]]]:
    """What an earlier build measured for variants that are still the same (by name)."""
    try:
        known = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["variants"]
        return {v.name: known[v.name]["resources"] for v in variants if v.name in known}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_order(files: dict[str, str]) -> list[str]:
    return sorted(files, key=lambda path: (not path.startswith("kernels/"), path))


def _orphans(folder: Path, files: dict[str, str]) -> list[str]:
    present = (p.relative_to(folder).as_posix() for p in folder.rglob("*.py"))
    return sorted(path for path in present if path not in files)


def _replace(path: Path, text: str) -> bool:
    """Write a file in one step unless it already says so; whether it changed."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


@contextmanager
def _locked(out_dir: Path, name: str) -> Iterator[None]:
    """Let one build at a time write a package; a second one waits."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with open(out_dir / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
