"""Versions of installed software, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path


def version_of(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_version() -> str | None:
    """`triton.__version__`, whatever the wheel is called; None without Triton.

    A distribution `triton` with more detail (such as a commit) or another version is named too,
    because what it compiles may differ.
    """
    own = own_triton_version()
    named = version_of("triton")
    if own is None or named in (None, own):
        return own
    assert named is not None
    return named if named.startswith(f"{own}+") else f"{own} (distribution {named})"


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None if nvidia-smi is missing, hangs or reports none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(rb"\s*(\d+(?:\.\d+)+)\s*(?:\n|$)", said)
    return found[1].decode() if found else None


def own_triton_version() -> str | None:
    """`triton.__version__`, read without importing it; "unknown" if its file does not say."""
    if "triton" in sys.modules:
        return getattr(sys.modules["triton"], "__version__", None)
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).read_text(encoding="utf-8", errors="replace")
    said = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    return said.group(1) if said else "unknown"
