"""Figures where matplotlib is installed; a run needs none."""

from __future__ import annotations

from types import ModuleType


def figures() -> ModuleType | None:
    """`training.plot`; None, after a line that says so, where matplotlib is not installed."""
    try:
        from . import plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no figure: matplotlib is not installed")
        return None
    return plot
