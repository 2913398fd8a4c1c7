"""Files that appear whole or not at all, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, text: str) -> bool:
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
        _forget_bytecode(path)
        os.replace(temporary, path)
        _forget_bytecode(path)  # of whoever imported the old file in between
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def _forget_bytecode(path: Path) -> None:
    """Remove what Python keeps of a module.

    It tells versions apart by size and by the second of their time: another of the same size, made
    within a second or after the clock was set back, would not be read.
    """
    if path.suffix == ".py":
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time do what `name` stands for in a folder; a second one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
