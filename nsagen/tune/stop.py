"""Ctrl-C that waits for the end of what must not be left half done."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future, TimeoutError
from types import FrameType, TracebackType
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.1


class Stoppable:
    """In this context the first Ctrl-C is noted, and raised by `check` or `wait`.

    A second one is raised at once. Outside the main thread, where Python delivers no
    signals, it changes nothing.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Stoppable:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self._asked:
            raise KeyboardInterrupt

    def wait(self, job: Future[T]) -> T:
        """A job's result; stops waiting when Ctrl-C is pressed."""
        while True:
            try:
                return job.result(timeout=_POLL_S)
            except TimeoutError:
                if job.done():
                    raise
                self.check()
