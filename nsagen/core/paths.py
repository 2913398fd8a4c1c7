"""Where the shipped templates and specs are: in a checkout, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _find(name: str) -> Path:
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def templates_dir() -> Path:
    """The folder of the templates, one folder an op below it."""
    return _find("templates")


def specs_dir() -> Path:
    """The folder of the shipped specs."""
    return _find("specs")
