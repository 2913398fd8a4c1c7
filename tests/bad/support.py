"""Running the command line on broken files: in this process, within a time, writing nothing."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nsagen.cli.app import main

FOLDER = Path(__file__).resolve().parent
SECONDS = 2.0
"""That refusing a file may take, of this process's own time: machines are busy."""


@contextmanager
def no_hang(seconds: float = SECONDS) -> Iterator[None]:
    """Fail where the code inside computes for longer."""

    def stop(*_: object) -> None:
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run(*arguments: str) -> int:
    """The exit code of `nsagen` with these arguments."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    code = end.value.code or 0
    assert isinstance(code, int)
    return code


def table(kind: str) -> list[tuple[str, int, str]]:
    """(file, exit code, text) of each row of expected.txt whose file lies in the folder `kind`."""
    lines = (FOLDER / "expected.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ", 2) for line in lines if not line.startswith("#")]
    return [(file, int(code), text) for file, code, text in rows if file.startswith(f"{kind}/")]


def matches(pattern: str, text: str) -> bool:
    """Whether the text is the pattern, in which * stands for anything."""
    return bool(re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but stored bytecode, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
