"""The folder in which Triton keeps what it compiles, and its errors in words that name it."""

from __future__ import annotations

import os
from pathlib import Path

from nsagen.core.errors import BuildError

VARIABLE = "TRITON_CACHE_DIR"
REMEDY = f"set {VARIABLE} to a folder that can be written"


def compiler_cache() -> Path:
    """Triton's folder: $TRITON_CACHE_DIR, or the one in $TRITON_HOME or in the user's home."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return Path(os.environ.get(VARIABLE) or Path(home, ".triton", "cache"))


def cache_error(error: OSError) -> BuildError | None:
    """What to raise for an error of Triton that is about its cache; None if it is about another.

    Triton's own text names neither its cache nor the variable.
    """
    folder = Path(os.path.abspath(compiler_cache()))
    if not isinstance(error.filename, (str, os.PathLike)):
        return None
    place = Path(os.path.abspath(error.filename))
    if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
        return None
    return BuildError(
        f"Triton's cache, {folder}, must be a folder that can be written; got "
        f"{error.strerror}: {place}; {REMEDY}"
    )
