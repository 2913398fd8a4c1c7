"""Processes that die or run out of something at a chosen step."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def start_child(work: Callable[[], object]) -> int:
    """Start some work in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if "torch" in sys.modules:  # OpenMP's threads do not survive a fork: a region waits
                sys.modules["torch"].set_num_threads(1)
            result = work()
            code = result if isinstance(result, int) else 0
        finally:
            os._exit(code)  # whatever was raised: this process must not go on with the tests
    return child


def exit_code(child: int) -> int:
    """The code that a child ends with, when it does; negative the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], object]) -> int:
    """Do some work in a forked process: its exit code, negative the signal that ended it.

    The code is what the work returns, if that is a number, and 99 where it raises.
    """
    return exit_code(start_child(work))


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Do some work, killed after some time; whether it was, rather than ended by itself."""
    child = start_child(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # if it has ended, it has not been waited for: it is there
    code = exit_code(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def forked(works: Sequence[Callable[[], object]]) -> list[int]:
    """Do some works at once, each in a process of its own; their exit codes, as of `in_child`."""
    return [exit_code(child) for child in [start_child(work) for work in works]]


def killed_at(
    step: int, work: Callable[[], object], calls: Sequence[str] = ("replace",), of: Any = os
) -> bool:
    """Do some work, killed before its call number `step` (from 0) of some functions of `of`.

    Args:
        step: from 0.
        work: what to do.
        calls: names in `of`; by default what puts a file in place.
        of: a module or class.

    Returns:
        whether it came that far; if not, the work ended by itself.
    """

    left = [step]

    def dying(original: Callable[..., object], *args: object, **more: object) -> object:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*args, **more)

    def run() -> None:
        for name in calls:
            original = getattr(of, name)
            # A function, not a partial: one that stands in for a method gets its object.
            setattr(of, name, lambda *a, _of=original, **k: dying(_of, *a, **k))
        work()

    code = in_child(run)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def free_port() -> int:
    """A port on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of a size such as "16k", or "16k,ro", at a folder; how to give it another.

    Skips the test where mounting is not allowed.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def with_files_of_at_most(size: int, work: Callable[[], object]) -> int:
    """Do some work in a process whose files can grow to so many bytes; its exit code."""

    def run() -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return work()

    return in_child(run)
