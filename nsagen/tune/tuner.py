"""The tuner: searches one task after another and decides each by a final comparison."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from optuna.storages import BaseStorage
from optuna.study import Study

from nsagen.tune.coding import Coding
from nsagen.tune.decide import decide_search
from nsagen.tune.evaluate import Evaluator
from nsagen.tune.record import TuningRecord
from nsagen.tune.search import Candidate, Search, fingerprint_or_none
from nsagen.tune.settings import Device, Settings, Step
from nsagen.tune.stop import Stoppable
from nsagen.tune.storage import heartbeats
from nsagen.tune.task import Task
from nsagen.workload import Schedule

NEIGHBOURS = 3
"""Winners of similar tasks that are tried right after the default."""


@dataclass
class _Opened:
    """A search whose first candidates are being compiled."""

    search: Search
    pending: deque[Candidate]


class Tuner:
    """Tunes tasks on one device; searches of the same storage may run beside it."""

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
        self._opened: dict[Task, _Opened] = {}
        self._running: dict[int, Candidate] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._stop = Stoppable()
        self.studies: list[Study] = []

    def run(self, tasks: Sequence[Task], on_record: Callable[[TuningRecord], None]) -> list[str]:
        """Search every task; `on_record` gets each record as soon as it is decided.

        Tasks with few schedules go first: the time that they leave goes to those with many.

        Returns:
            a line for each task that gave no record, and why.
        """
        end = None if self._settings.seconds is None else time.monotonic() + self._settings.seconds
        failures = []
        tasks = sorted(tasks, key=lambda task: len(self._evaluator.candidates(task).schedules))
        with self._stop, self._released():
            for number, task in enumerate(tasks):
                following = tasks[number + 1] if number + 1 < len(tasks) else None
                share = None
                if end is not None:
                    now = time.monotonic()
                    share = now + max(0.0, end - now) / (len(tasks) - number)
                decided = self._tune(task, (number + 1, len(tasks)), share, following)
                if isinstance(decided, str):
                    failures.append(f"{task}: {decided}")
                else:
                    self._known[decided.key] = decided
                    on_record(decided)
        return failures

    @contextmanager
    def _released(self) -> Iterator[None]:
        """In the end, however it comes, leave no schedule to this process that it won't measure."""
        try:
            yield
        finally:
            for opened in self._opened.values():
                self._give_up(opened)
            self._opened.clear()

    def _tune(
        self, task: Task, place: tuple[int, int], deadline: float | None, following: Task | None
    ) -> TuningRecord | str:
        opened = self._open(task)
        search, pending = opened.search, opened.pending
        self._opened[task] = opened
        self.studies.append(search.study)
        with heartbeats(search.study, self._running):
            ended = self._search(search, pending, place, deadline, following)
        self._give_up(self._opened.pop(task))
        return self._decide(search, ended)

    def _open(self, task: Task) -> _Opened:
        if task in self._opened:
            opened = self._opened.pop(task)
            opened.search.line_up(self._neighbours(task))  # with what was found since
            return opened
        candidates = self._evaluator.candidates(task)
        search = Search(
            task,
            Coding(candidates.schedules),
            self._storage,
            scope=f"{self._settings.objective} on {self._device.slug}",
            version=candidates.version,
            first=[candidates.default, *self._neighbours(task)],
            sampler=self._settings.sampler,
            seed=self._settings.seed,
        )
        return _Opened(search, deque())

    def _search(
        self,
        search: Search,
        pending: deque[Candidate],
        place: tuple[int, int],
        deadline: float | None,
        following: Task | None,
    ) -> str:
        """Evaluate until the search ends; why it did."""
        best_ms, task = None, search.task
        count = len(search.measured())
        first = count
        while True:
            self._stop.check()
            if ended := search.finished(self._settings.budget):
                return ended
            if deadline is not None and time.monotonic() > deadline and count > first:
                return "its time is up"
            self._fill(search, pending, count)
            if not pending:
                return "every schedule is measured"
            if count == first + self._settings.ahead and following is not None:
                self._prepare(following)
            candidate = self._pop(task, pending)
            job = self._thread.submit(self._evaluator.finish, task, candidate.schedule, best_ms)
            if self._settings.ahead > 1:  # choose what is next while the device works
                self._fill(search, pending, count + 1)
            outcome = self._stop.wait(job)
            search.tell(candidate, outcome)
            self._running.pop(candidate.trial._trial_id, None)
            count += 1
            if outcome.ms is not None:
                best_ms = outcome.ms if best_ms is None else min(best_ms, outcome.ms)
            self._on_step(
                Step(
                    task,
                    *place,
                    count,
                    len(search.coding),
                    candidate.schedule,
                    outcome.reason,
                    outcome.ms,
                    best_ms,
                )
            )

    def _give_up(self, opened: _Opened) -> None:
        """Leave what was asked for and not measured to a later search."""
        for candidate in opened.pending:
            self._running.pop(candidate.trial._trial_id, None)
        opened.search.give_up()
        opened.pending.clear()

    def _fill(self, search: Search, pending: deque[Candidate], count: int) -> None:
        """Ask for schedules, and have them compiled, until enough are on their way."""
        room = min(self._settings.ahead, self._settings.budget.trials - count)
        while len(pending) < room and (candidate := search.ask()):
            self._running[candidate.trial._trial_id] = candidate
            self._evaluator.start(search.task, candidate.schedule)
            pending.append(candidate)

    def _prepare(self, task: Task) -> None:
        """Have the next task's first candidates compiled while this one's are measured."""
        if task not in self._opened and self._settings.ahead > 1:
            opened = self._open(task)
            if not opened.search.finished(self._settings.budget):
                self._fill(opened.search, opened.pending, len(opened.search.measured()))
            self._opened[task] = opened

    def _pop(self, task: Task, pending: deque[Candidate]) -> Candidate:
        """The first candidate that is compiled, or else the one that was asked for first."""
        for candidate in pending:
            if self._evaluator.ready(task, candidate.schedule):
                pending.remove(candidate)
                return candidate
        return pending.popleft()

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

    def _decide(self, search: Search, ended: str) -> TuningRecord | str:
        """The record of a task, by its final comparison; or why there is none."""
        task = search.task
        known = self._known.get((task.workload, task.bucket, self._settings.objective))
        if known and _still_holds(known, search):
            return known
        return decide_search(search, self._evaluator, self._device, self._settings.objective, ended)


def _still_holds(known: TuningRecord, search: Search) -> bool:
    """Whether nothing was measured since a record was made of this very search."""
    task = search.task
    return (
        known.measured == len(search.measured())
        and known.sizes == task.sizes_text
        and known.fingerprint == fingerprint_or_none(task, known.schedule)
    )
