"""Where nsagen finds its templates and specs, and where its user cache is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _find(name: str) -> Path:
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def visible(paths: Iterable[Path]) -> list[Path]:
    """The given paths in order, but for those whose name begins with a dot.

    Editors and file systems leave such files: locks, copies and attributes of others.
    """
    return sorted(path for path in paths if not path.name.startswith("."))


def templates_dir() -> Path:
    """The folder of the templates, one folder an op below it."""
    return _find("templates")


def specs_dir() -> Path:
    """The folder of the shipped specs."""
    return _find("specs")


def cache_dir() -> Path:
    """$NSAGEN_CACHE_DIR, or the platform's folder for caches of users."""
    chosen = os.environ.get("NSAGEN_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsagen"
    return user_cache_path("nsagen")
