"""Runs a `ContinuousBatch` in a thread of its own for requests of an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model.drafts import Drafter
from nsagen.model.requests import Request
from nsagen.model.sequences import NewToken
from nsagen.model.serving import ContinuousBatch

_log = logging.getLogger("nsagen.serve")


class Busy(Exception):
    """So many requests wait that another is refused."""


class Stopped(Exception):
    """The server ends, and with it this request."""


class Failed(Exception):
    """A request failed in the batch, through no fault of its sender."""


Arrival = tuple[int, NewToken | Exception]
"""A job's number in its call, and its next token, or what ended it."""


@dataclass(eq=False)
class Job:
    """A sequence on its way through the batch.

    Attributes:
        place: its number in its call.
        request: checked.
        arrivals: of its call, on the event loop.
        number: in the batch, once it is there.
    """

    place: int
    request: Request
    arrivals: asyncio.Queue[Arrival]
    number: int | None = None
    ended: bool = False


class Engine:
    """Takes requests in order, runs them together, and hands out tokens as they come.

    Every method belongs to the event loop on which `start` was called. A request waits until the
    batch has a slot for it. If a step fails for every sequence, each gets the error, and the
    engine continues with the next requests.

    Args:
        model: a `ToyNSALlama` or `ToyLlama` with an InferenceConfig; its weights stay as they are
            while requests run.
        queue: requests that may wait for a slot.
        drafter: makes what guesses a request's next tokens; see `ContinuousBatch.add`.
    """

    def __init__(
        self, model: Any, queue: int = 256, drafter: Callable[[], Drafter] | None = None
    ) -> None:
        self.batch, self.drafter = ContinuousBatch(model), drafter
        self.batch.weights_change = False
        self._limit = queue
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._cancelled: deque[Job] = deque()
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="nsagen-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def stopping(self) -> bool:
        """Whether it ends."""
        return self._stopping

    def start(self) -> None:
        """Begin to run requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue the jobs of a call, all or none.

        Raises:
            InvalidInputError: more jobs than an idle server takes.
            Busy: too many requests wait.
            Stopped: the server ends.
        """
        most = self._limit + self.batch.limits.max_batch_size
        if len(jobs) > most:
            raise InvalidInputError(
                f"prompt: a call may have at most {most} prompts here; got {len(jobs)}; "
                "make several calls"
            )
        with self._changed:
            if self._stopping:
                raise Stopped
            if len(self._waiting) + len(jobs) > self._limit + self._free():
                raise Busy
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Free the slot of a job whose tokens nobody reads, if it has not ended."""
        with self._changed:
            if not job.ended:
                job.ended = True
                self._cancelled.append(job)
                self._changed.notify()

    def stop(self) -> None:
        """End every request with `Stopped` now, and the thread after its step."""
        with self._changed:
            self._stopping = True
            for job in (*self._waiting, *self._running.values()):
                if not job.ended:
                    job.arrivals.put_nowait((job.place, Stopped()))
            self._waiting.clear()
            self._changed.notify()

    def join(self, seconds: float) -> bool:
        """Wait for the thread; returns whether it has ended."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _free(self) -> int:
        return self.batch.limits.max_batch_size - len(self._running)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            _log.exception("the engine failed; the server takes no more requests")
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.stop)
            raise

    def _serve(self) -> None:
        while self._next():
            try:
                new = self.batch.step()
            except Exception as error:
                _log.exception("a step failed for every sequence; all of them end")
                self.batch.clear()
                self._hand_out([(job, error) for job in self._running.values()])
                continue
            known = [one for one in new if one.sequence in self._running]
            self._hand_out([(self._running[one.sequence], one) for one in known])
        self.batch.clear()

    def _next(self) -> bool:
        """Let requests in and out of the batch, until it has something to do; False at the end."""
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._cancelled or self._running):
                    self._changed.wait()
                if self._stopping:
                    return False
                cancelled, self._cancelled = self._cancelled, deque()
                for job in cancelled:
                    if job in self._waiting:
                        self._waiting.remove(job)
            for job in cancelled:
                if job.number is not None and self._running.pop(job.number, None):
                    self.batch.cancel(job.number)
            while self._admitted():
                pass
            if self._running:
                return True

    def _admitted(self) -> bool:
        """Whether the first request that waits has left the queue: it has a slot, or an error."""
        with self._changed:
            if not self._waiting or self._stopping:
                return False
            job = self._waiting[0]
        error: Exception | None = None
        try:
            number = self.batch.admit(f"request {id(job):x}", job.request)
        except CapacityError as full:
            if self._running:
                return False  # others will end
            error = full
        except Exception as refused:
            error = refused
        with self._changed:
            if self._stopping:
                return False
            self._waiting.popleft()
            if error is None:
                job.number = number
                self._running[number] = job
        if error is not None:
            self._hand_out([(job, error)])
        return True

    def _hand_out(self, arrivals: list[tuple[Job, NewToken | Exception]]) -> None:
        for job, new in arrivals:
            if job.number is not None and (isinstance(new, Exception) or new.finished):
                self._running.pop(job.number, None)
        assert self._loop is not None
        if arrivals and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, arrivals)


def _put(arrivals: list[tuple[Job, NewToken | Exception]]) -> None:
    """On the event loop: tokens of a job that was cancelled meanwhile are dropped."""
    for job, new in arrivals:
        if not job.ended:
            job.ended = isinstance(new, Exception) or bool(new.finished)
            job.arrivals.put_nowait((job.place, new))
