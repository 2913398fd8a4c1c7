"""The tuner: several concurrent searches share the compilers and the device.

A single search leaves the device idle: its next schedules depend on what was measured, and
compiling takes longer than measuring. So enough searches run to keep every compiler busy. Any
search with a compiled schedule may measure it; among several, the one that has used the device
least goes first. A search that ends makes room for the next.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study

from nsagen.core.workload import Schedule
from nsagen.records.record import TuningRecord
from nsagen.tune.encoding import Encoding, combinations
from nsagen.tune.evaluate import Evaluator
from nsagen.tune.final_round import FinalRound
from nsagen.tune.open_search import OpenSearch
from nsagen.tune.outcome import Outcome
from nsagen.tune.search import Candidate, Search
from nsagen.tune.settings import Device, Settings, Step
from nsagen.tune.stop import Stoppable
from nsagen.tune.storage import heartbeats
from nsagen.tune.task import Task, fingerprint_or_none

NEIGHBOURS = 3
"""Winners of similar tasks that are tried right after the default."""

ASKS_A_TURN = 2
"""Schedules that are chosen between two looks at the device."""

RESERVE = 0.1
"""Share of the time that is reserved for the last comparisons."""

_PAUSE_S = 0.005


@dataclass(frozen=True)
class _Job:
    """The device's current work, and what to do with the result."""

    open_search: OpenSearch
    future: Future[Any]
    since: float
    then: Callable[[Any], None]


class Tuner:
    """Tunes tasks on one device; other processes may search the same storage at the same time."""

    def __init__(
        self,
        device: Device,
        storage: BaseStorage,
        evaluator: Evaluator,
        settings: Settings,
        known: Iterable[TuningRecord] = (),
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self._device = device
        self._storage = storage
        self._evaluator = evaluator
        self._settings = settings
        self._known = {r.key: r for r in known if r.objective == settings.objective}
        self._on_step = on_step
        self._width = max(1, settings.ahead // settings.each)
        self._waiting: deque[tuple[int, Task]] = deque()
        self._open: list[OpenSearch] = []
        self._running: dict[int, Candidate] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._stop = Stoppable()
        self._end: float | None = None
        self._failures: list[str] = []
        self._freed = 0.0
        self._count = 0
        self.studies: list[Study] = []

    def run(self, tasks: Sequence[Task], on_record: Callable[[TuningRecord], None]) -> list[str]:
        """Search every task; `on_record` gets each record as soon as it is decided.

        Returns:
            a line for each task without a record, with the reason.
        """
        self._end = self._settings.end(RESERVE)
        self._first_round = self._end is not None and self._settings.one_first
        self._count = len(tasks)
        ordered = list(enumerate(self._ordered(tasks), 1))
        self._waiting.extend(ordered)
        job: _Job | None = None
        with self._stop, heartbeats(self._storage, self._running), self._released():
            while True:
                self._stop.check()  # here too: a device that is never waited for takes no wait
                self._admit()
                self._fill()
                following = self._begin(None if job is None else job.open_search)
                if job is not None:
                    self._finish(job, on_record)
                elif following is None:
                    if not self._open and not self._waiting:
                        if not self._first_round:
                            return self._failures
                        self._first_round = False  # what time is left is shared
                        self._waiting.extend(ordered)
                        self._failures.clear()
                    time.sleep(_PAUSE_S)
                job = following

    def _ordered(self, tasks: Sequence[Task]) -> list[Task]:
        """One task of each op and pass, then the next of each: neighbours' winners arrive in time.

        Tasks with few schedules go first, because the time they leave goes to the others.
        """
        groups: dict[tuple[str, str], list[Task]] = defaultdict(list)
        for task in tasks:
            groups[task.workload.op, task.workload.pass_].append(task)
        rank = {
            task: (turn, combinations(task.workload, self._device.target))
            for group in groups.values()
            for turn, task in enumerate(group)
        }
        return sorted(tasks, key=lambda task: rank[task])

    @contextmanager
    def _released(self) -> Iterator[None]:
        """On any exit, release the schedules that this process will not measure."""
        try:
            yield
        finally:
            for open_search in self._open:
                open_search.give_up(self._running)

    def _admit(self) -> None:
        """Open a search if there is room; it gets its share of the remaining time.

        One at a time: the compilers and the device have work before all are open.
        """
        while self._waiting and self._searching() < self._width:
            number, task = self._waiting.popleft()
            if self._end is not None and time.monotonic() > self._end and self.studies:
                if self._record_of(task) is None:
                    self._failures.append(
                        f"{task}: not begun; the time is up; the same command goes on from here"
                    )
                continue
            candidates = self._evaluator.candidates(task)
            search = Search(
                task,
                Encoding(candidates.schedules),
                self._storage,
                scope=self._scope,
                first=[candidates.default, *self._neighbours(task), *candidates.others],
                sampler=self._settings.sampler,
                seed=self._settings.seed,
            )
            if all(study.study_name != search.study.study_name for study in self.studies):
                self.studies.append(search.study)
            grace = 0.0 if self._settings.one_first else None  # `RESERVE` is for what runs
            times = (self._deadline(), self._end, grace)
            open_search = OpenSearch(search, self._settings.budget, number, *times)
            self._open.append(open_search)
            self._conclude(open_search)
            return

    @property
    def _scope(self) -> str:
        """What a study's outcomes hold for: another Triton may compile other kernels."""
        device = self._device
        with_ = f", triton {device.triton}" if device.triton else ""
        return f"{self._settings.objective} on {device.slug}{with_}"

    def _searching(self) -> int:
        """Open searches that still ask for schedules: the final round needs no compiler."""
        return sum(open_search.final is None for open_search in self._open)

    def _deadline(self) -> float | None:
        """When a search that starts now must end: all open searches share the device."""
        if self._end is None:
            return None
        if self._first_round:
            return time.monotonic()  # over with its first result
        now, left = time.monotonic(), len(self._waiting) + self._searching() + 1
        return now + max(0.0, self._end - now) * min(1.0, self._width / left)

    def _conclude(self, open_search: OpenSearch) -> None:
        """End a search that is over and prepare its decision; its record may exist already."""
        if open_search.final is not None or not (ended := open_search.over()):
            return
        open_search.give_up(self._running)
        search = open_search.search
        task = search.task
        known = self._record_of(task)
        open_search.final = FinalRound(
            search, self._evaluator, self._device, self._objective, ended
        )
        if known and known.triton == self._device.triton and _still_holds(known, search):
            open_search.final.result = known

    def _record_of(self, task: Task) -> TuningRecord | None:
        return self._known.get((task.workload, task.bucket, self._objective, task.sizes_text))

    @property
    def _objective(self) -> Any:
        return self._settings.objective

    def _fill(self) -> None:
        """Ask for schedules and compile them, starting with the search that has fewest pending.

        A few at a time: the device must not wait while many are chosen.
        """
        for open_search in self._open:
            self._conclude(open_search)
        each = max(1, min(self._settings.ahead // max(1, self._searching()), self._width + 1))
        hungry = [c for c in self._open if c.final is None and c.has_room(each)]
        if self._first_round:
            hungry = [c for c in hungry if not (c.pending or c.measuring)]
        for open_search in sorted(hungry, key=lambda c: c.pending)[:ASKS_A_TURN]:
            if candidate := open_search.ask():
                self._running[candidate.trial._trial_id] = candidate
                self._evaluator.start(open_search.task, candidate.schedule)
            self._conclude(open_search)

    def _begin(self, busy: OpenSearch | None) -> _Job | None:
        """Give the device something to do, if anything is ready.

        Args:
            busy: the search whose job is still running; it cannot be decided until then.
        """
        # Decisions first: they are short, and each makes room.
        for open_search in sorted(self._open, key=lambda c: (c.final is None, c.spent)):
            final = open_search.final
            if final is not None and open_search is not busy and final.ready:
                call = final.step if final.result is None else (lambda: None)
                return self._submit(open_search, lambda _: None, call)
            candidate = open_search.next(self._evaluator)
            if candidate is not None:

                def tell(
                    outcome: Outcome,
                    open_search: OpenSearch = open_search,
                    candidate: Candidate = candidate,
                ) -> None:
                    self._tell(open_search, candidate, outcome)

                schedule, best = candidate.schedule, open_search.best_ms
                return self._submit(
                    open_search, tell, self._evaluator.finish, open_search.task, schedule, best
                )
        return None

    def _submit(
        self,
        open_search: OpenSearch,
        then: Callable[[Any], None],
        call: Callable[..., Any],
        *args: Any,
    ) -> _Job:
        return _Job(open_search, self._thread.submit(call, *args), time.monotonic(), then)

    def _finish(self, job: _Job, on_record: Callable[[TuningRecord], None]) -> None:
        """Wait for the device, and record what it found."""
        result = self._stop.wait(job.future)
        open_search = job.open_search
        now = time.monotonic()
        open_search.spent += now - max(job.since, self._freed)
        self._freed = now
        job.then(result)
        decided = open_search.final.result if open_search.final else None
        if decided is None:
            return
        self._open.remove(open_search)
        if isinstance(decided, str):
            self._failures.append(f"{open_search.task}: {decided}")
            return
        again = self._settings.one_first and not self._first_round
        if again and decided is self._known.get(decided.key):
            return  # the first round has reported it
        self._known[decided.key] = decided
        for other in self._open:
            if other.final is None and (found := self._neighbours(other.task)):
                other.search.line_up(found)
        on_record(decided)

    def _tell(self, open_search: OpenSearch, candidate: Candidate, outcome: Outcome) -> None:
        open_search.tell(candidate, outcome)
        self._running.pop(candidate.trial._trial_id, None)
        self._on_step(
            Step(
                open_search.task,
                open_search.number,
                self._count,
                open_search.count,
                len(open_search.search.encoding),
                candidate.schedule,
                outcome.reason,
                outcome.ms,
                open_search.best_ms,
            )
        )

    def _neighbours(self, task: Task) -> list[Schedule]:
        """Winners of other buckets and of the most similar workloads of the same op and pass."""
        params = set(task.workload.params)

        def unlike(record: TuningRecord) -> tuple[int, bool]:
            differ = len(params ^ set(record.workload.params))
            return differ, record.bucket != task.bucket

        same = [
            record
            for record in self._known.values()
            if (record.workload.op, record.workload.pass_)
            == (task.workload.op, task.workload.pass_)
        ]
        found = dict.fromkeys(record.schedule for record in sorted(same, key=unlike))
        allows = self._evaluator.candidates(task).allows
        return [schedule for schedule in found if allows(schedule)][:NEIGHBOURS]


def _still_holds(known: TuningRecord, search: Search) -> bool:
    """Whether nothing was measured since this search's record was made."""
    task = search.task
    return known.measured == len(search.measured()) and known.fingerprint == fingerprint_or_none(
        task, known.schedule
    )
