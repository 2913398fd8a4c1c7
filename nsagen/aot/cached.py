"""Resources of compiled kernels, cached on disk: unchanged code is not compiled again.

    <user cache>/compiled/<key>.json

The key covers the kernel's fingerprint, the target, the version of Triton, the environment's
settings of its compiler, and the code that compiles and measures, so no entry ever has to be
deleted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nsagen.codegen.fingerprint import code_fingerprint, source_fingerprint
from nsagen.core.compiler import compiler_name
from nsagen.core.files import is_file, replace_file
from nsagen.core.paths import cache_dir
from nsagen.core.target import Target
from nsagen.core.workload import Workload

if TYPE_CHECKING:
    from nsagen.aot.resources import Resources

_NAME = "{kernel}"
"""Stands for the kernel's own name."""


def compiled_resources(path: Path, workload: Workload, target: Target) -> tuple[Resources, ...]:
    """As `compile_variant`, from an earlier run if there was one for the same code.

    Raises:
        BuildError: Triton cannot compile a kernel for the target; this is not cached.
    """
    from nsagen.aot.resources import Resources  # imports triton

    memory = cache_dir() / "compiled" / f"{compile_key(path, workload, target)}.json"
    try:
        rows = json.loads(memory.read_text(encoding="utf-8")) if is_file(memory) else []
        if rows and all(_is_measured(row) for row in rows):  # every variant has a kernel
            return tuple(Resources(**{**row, "kernel": _named(row, path)}) for row in rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # missing, or written by something else: compile
    from nsagen.aot.compile import compile_variant

    found = compile_variant(path, workload, target)
    rows = [{**asdict(one), "kernel": one.kernel.replace(path.stem, _NAME)} for one in found]
    with contextlib.suppress(OSError):  # an unwritable folder only means that nothing is cached
        replace_file(memory, json.dumps(rows, indent=1) + "\n")
    return found


def compile_key(path: Path, workload: Workload, target: Target) -> str:
    """Hex digest over everything that a kernel file's resources on a target depend on."""
    fingerprint = source_fingerprint(path.read_text(encoding="utf-8"), path.stem)
    place = (workload.op, workload.pass_, str(target))
    parts = (fingerprint, *place, compiler_name(), _tools(workload.op))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _tools(op: str) -> str:
    """Fingerprints of the code that makes an op's example call, compiles it and reads resources."""
    package = Path(__file__).resolve().parents[1]
    files = [package / "aot" / f"{name}.py" for name in ("compile", "resources", "cubin", "cached")]
    files += sorted((package / "cases").glob(f"{op}*.py"))
    return " ".join(code_fingerprint(file.read_text(encoding="utf-8")) for file in files)


def _is_measured(row: dict[str, object]) -> bool:
    """Whether each value has the type that is measured: somebody may have edited the file."""
    texts = {"kernel", "target", "matrix"}
    return all(type(value) is (str if key in texts else int) for key, value in row.items())


def _named(row: dict[str, str], path: Path) -> str:
    return row["kernel"].replace(_NAME, path.stem)
