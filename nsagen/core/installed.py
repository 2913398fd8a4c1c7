"""Versions of installed software, without importing it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from nsagen.core.errors import InvalidInputError


def version_of(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_extra(where: str, extra: str, *modules: str) -> None:
    """Refuse to go on without the packages of one of nsagen's extras.

    Raises:
        InvalidInputError: one of the modules is not installed; the text has the command to run.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInputError(
            f"{where}: needs {' and '.join(modules)}; got no {' and no '.join(missing)}; "
            f"run: pip install 'nsagen[{extra}]'"
        )


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


DRIVER_S = 20.0
"""Seconds that nvidia-smi has to answer: a broken driver can make it hang."""


def driver_version(problems: list[str] | None = None) -> str | None:
    """The version of NVIDIA's driver; None if nvidia-smi is missing, hangs or reports none.

    Args:
        problems: gets a text if nvidia-smi hangs.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = _answer(command)
    except OSError:
        return None
    except subprocess.TimeoutExpired:
        if problems is not None:
            problems.append(
                f"nvidia-smi did not answer within {DRIVER_S:g} s; run it by hand: if it hangs, "
                "the driver or a GPU needs a reset"
            )
        return None
    found = re.match(rb"\s*(\d+(?:\.\d+)+)\s*(?:\n|$)", said)
    return found[1].decode() if found else None


def _answer(command: list[str]) -> bytes:
    """What a command prints; it and what it started are killed when its time is up.

    Raises:
        subprocess.TimeoutExpired: its time is up.
    """
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(
        command, stdin=null, stdout=pipe, stderr=null, start_new_session=True
    )
    try:
        return process.communicate(timeout=DRIVER_S)[0]
    except BaseException:  # an interrupt does not reach another session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)  # in the driver it may not die
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()


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
