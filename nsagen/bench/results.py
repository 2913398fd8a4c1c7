"""Results as files: rows of numbers with their device, versions and command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from nsagen.core.files import check_own, replace_file
from nsagen.core.installed import driver_version
from nsagen.core.text import shell_text
from nsagen.core.version import __version__
from nsagen.runtime.device import device_slug

Row = Mapping[str, Any]
Keep = Callable[[Sequence[Row]], object]
"""Keeps the rows so far, for a benchmark that may not reach its end."""

_MARK = re.compile(rb'\A\{\s*"provenance": \{[^}]*"nsagen": "')


def provenance() -> dict[str, str]:
    """Device, driver, versions and command: what a number needs beside it."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "driver": (driver_version() or "") if on_gpu else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "nsagen": __version__,
        "command": _command(),
    }


def results_folder() -> Path:
    """$OUT, or benchmarks/results/<device> below the working folder."""
    device = device_slug() if torch.cuda.is_available() else "cpu"
    return Path(os.environ.get("OUT") or Path("benchmarks") / "results" / device)


def write_results(name: str, rows: Sequence[Row], folder: Path | None = None) -> Path:
    """Write `<name>.json` with the rows and their provenance; returns its path.

    Raises:
        InvalidInputError: a file exists that is not nsagen's results.
    """
    path = check_free(name, folder)
    content = {"provenance": provenance(), "rows": [dict(row) for row in rows]}
    replace_file(path, json.dumps(content, indent=1) + "\n")
    return path


def check_free(name: str, folder: Path | None = None) -> Path:
    """Where `write_results` writes; call it before a benchmark runs.

    Raises:
        InvalidInputError: a file exists that is not nsagen's results.
    """
    path = (folder or results_folder()) / f"{name}.json"
    check_own(path, _MARK, "results", "choose another --out")
    return path


def _command() -> str:
    """The typed command, except where to write, which is not part of what was measured."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    _, given = parser.parse_known_args(sys.argv[1:])
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name and spec.name != "nsagen.__main__":
        return shell_text(["python", "-m", spec.name, *given])
    if sys.argv[0].endswith(".py"):
        return shell_text(["python", sys.argv[0], *given])
    return shell_text(["nsagen", *given])
