"""Processes that die or run out of something at a chosen step."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable


def in_child(work: Callable[[], object]) -> int:
    """Do some work in a forked process: its exit code, negative the signal that ended it.

    The code is what the work returns, if that is a number, and 99 where it raises.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            result = work()
            code = result if isinstance(result, int) else 0
        finally:
            os._exit(code)  # whatever was raised: this process must not go on with the tests
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do some work, killed before it puts its file number `step` (from 0) in place.

    Returns:
        whether it came that far; if not, the work ended by itself.
    """

    def run() -> None:
        replace, left = os.replace, [step]

        def dying(*args: object, **more: object) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            replace(*args, **more)  # type: ignore[arg-type]

        os.replace = dying  # type: ignore[assignment]
        work()

    code = in_child(run)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def with_files_of_at_most(size: int, work: Callable[[], object]) -> int:
    """Do some work in a process whose files can grow to so many bytes; its exit code."""

    def run() -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return work()

    return in_child(run)
