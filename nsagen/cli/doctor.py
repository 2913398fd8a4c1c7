"""`nsagen doctor`: what is installed here, what is stale, and what to do about it."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from nsagen.core.compiler_cache import REMEDY, compiler_cache
from nsagen.core.errors import NsagenError
from nsagen.core.files import check_writable
from nsagen.core.installed import driver_version, triton_version, version_of
from nsagen.core.paths import cache_dir, visible
from nsagen.core.text import counted
from nsagen.core.version import __version__
from nsagen.runtime.device import interpreting
from nsagen.runtime.user_cache import cache_folder


def examine(out_dir: Path) -> dict[str, Any]:
    """Facts about this machine, notes, and problems with their remedies.

    Returns:
        {"facts": name -> text, number or None, "notes": texts, "problems": texts}, all JSON.
    """
    notes: list[str] = []
    problems: list[str] = []
    gpus = _gpus(problems)
    facts: dict[str, str | None] = {
        "nsagen": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "torch": version_of("torch"),
        "triton": triton_version(),
        "numpy": version_of("numpy"),
        "ruff": version_of("ruff"),
        "GPUs": ", ".join(gpus) or None,
        "GPU driver": driver_version(problems),
        "optional": ", ".join(f"{name} {found}" for name, found in _optional().items()) or None,
        "user cache": f"{cache_dir()} ({_cache_use(notes, problems)})",
        "interpreter": "on (TRITON_INTERPRET)" if interpreting() else "off",
    }
    try:
        check_writable(cache_dir())
    except OSError as error:
        problems.append(
            f"the user cache, {cache_dir()}, cannot be written ({error.strerror}: "
            f"{error.filename}); set NSAGEN_CACHE_DIR to a folder that can"
        )
    try:
        check_writable(compiler_cache())
    except OSError as error:
        problems.append(
            f"Triton's cache, {compiler_cache()}, cannot be written ({error.strerror}: "
            f"{error.filename}); {REMEDY}"
        )
    if facts["torch"] is None:
        problems.append("torch is missing; run: pip install torch")
    if facts["triton"] is None:
        problems.append("triton is missing, so kernels cannot run; run: pip install triton")
    if facts["numpy"] is None:
        notes.append("numpy is missing, which Triton's interpreter needs; run: pip install numpy")
    if not gpus:
        notes.append("no GPU found; TRITON_INTERPRET=1 runs kernels on the CPU, slowly")
    if (facts["triton"] or "").startswith("3.6.") and _at_least(facts["numpy"], (2, 4)):
        notes.append("triton 3.6's interpreter fails with numpy 2.4; run: pip install 'numpy<2.3'")
    if facts["GPU driver"] and not gpus and _built_for_cpu():
        problems.append(
            "a GPU driver is installed, but this torch is built for CPUs; run: pip install torch "
            "--index-url https://download.pytorch.org/whl/cu130 (or the index for your driver)"
        )
    packages = _packages(out_dir, problems)
    facts["packages"] = ", ".join(packages) or None
    return {"facts": facts, "notes": notes, "problems": problems}


def _optional() -> dict[str, str]:
    """What is installed of what only some commands and integrations need."""
    names = ("transformers", "tokenizers", "optuna", "matplotlib", "plotly", "mkdocs-material")
    return {name: found for name in names if (found := version_of(name))}


def _built_for_cpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def prune() -> str:
    """Remove the kernels of other versions from the user cache; returns what was done.

    Raises:
        OSError: a folder cannot be removed.
    """
    old = [path for path in _of_kernels() if path.name != cache_folder().name]
    count = sum(map(_kernels, old))
    for path in old:
        shutil.rmtree(path)
    return f"removed {counted(count, 'kernel')} of other versions from {cache_dir()}"


def _cache_use(notes: list[str], problems: list[str]) -> str:
    """Kernels in the user cache; those of other versions of nsagen become a note."""
    current = cache_folder()
    try:
        counts = {path: _kernels(path) for path in _of_kernels()}
    except OSError as error:
        problems.append(f"the user cache, {cache_dir()}, cannot be read: {error.strerror}")
        return "unknown"
    here = counts.pop(current, 0)
    if counts:
        notes.append(
            f"the user cache has {counted(sum(counts.values()), 'kernel')} of other versions of "
            "nsagen or its templates; to remove them, run: nsagen doctor --prune"
        )
    return f"{counted(here, 'kernel')} of this version"


def _of_kernels() -> list[Path]:
    """The user cache's folders of kernels, one for each version of nsagen and its templates."""
    return [path for path in visible(cache_dir().glob("*")) if _is_of_kernels(path)]


def _kernels(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.py"))


def _is_of_kernels(folder: Path) -> bool:
    """Whether a folder holds kernels that some version of nsagen built, and nothing else."""
    if not re.fullmatch(r"\d[\w.+]*-[0-9a-f]{8}", folder.name) or not folder.is_dir():
        return False
    return not folder.is_symlink() and all(
        re.fullmatch(r"(cuda|hip)-\w+(-triton-[\w.]+)?", target.name)
        and target.is_dir()
        and all(path.suffix == ".py" or path.name[0] in "._" for path in target.iterdir())
        for target in folder.iterdir()
    )


def _at_least(version: str | None, least: tuple[int, int]) -> bool:
    numbers = (version or "").split(".")[:2]
    return (
        len(numbers) == 2
        and all(n.isdigit() for n in numbers)
        and tuple(map(int, numbers)) >= least
    )


def _gpus(problems: list[str]) -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    from nsagen.core.target import parse_target
    from nsagen.runtime.device import target_of

    found = []
    for index in range(torch.cuda.device_count()):
        target = target_of(torch.device("cuda", index))
        found.append(f"{torch.cuda.get_device_name(index)} ({target})")
        try:
            parse_target(target)
        except NsagenError as error:
            problems.append(f"GPU {index}: {error}")
    return found


def _packages(out_dir: Path, problems: list[str]) -> list[str]:
    """The generated packages below a folder; the stale ones become problems."""
    from nsagen.codegen.build import check, way_to_fresh
    from nsagen.core.packages import is_built, spec_of
    from nsagen.spec import load_spec

    found = []
    for folder in visible(out_dir.glob("*")):
        if not is_built(folder):
            continue
        found.append(folder.name)
        source = spec_of(folder)
        if source is None:
            problems.append(
                f"{folder}: cannot be checked: its spec is not where it was; "
                "build it again from where that is now, or remove the folder"
            )
            continue
        try:
            spec = load_spec(source)
            stale = check(spec, out_dir)
        except NsagenError as error:
            problems.append(f"{folder}: cannot be checked: {str(error).splitlines()[0]}")
            continue
        except OSError as error:
            problems.append(f"{error.filename or folder}: cannot be read: {error.strerror}")
            continue
        if stale:
            problems.append(
                f"{folder}: not up to date: {len(stale)} file{'s' * (len(stale) > 1)}, such as "
                f"{stale[0].path} ({stale[0].state}); "
                + way_to_fresh(stale, folder, spec.build_command(out_dir))
            )
    return found


def print_diagnosis(diagnosis: dict[str, Any]) -> None:
    """The facts as a table, then notes and problems as lines that can be copied."""
    from rich.markup import escape
    from rich.table import Table

    from nsagen.cli.console import console, print_line

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in diagnosis["facts"].items():
        table.add_row(name, escape("none" if value is None else str(value)))
    out = console()
    out.print(table)
    for heading in ("notes", "problems"):
        for text in diagnosis[heading]:
            print_line(f"{heading[:-1]}: {text}")
    if not diagnosis["problems"]:
        out.print("no problems found")
