"""A running search: what is compiling, how far it has come, and when it is over."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from nsagen.tune.evaluate import Evaluator
from nsagen.tune.final_round import FinalRound
from nsagen.tune.outcome import Outcome
from nsagen.tune.search import Budget, Candidate, Search

GRACE_S = 10.0
"""How long after the end of the whole run a search may still wait for its first result."""


class OpenSearch:
    """A running search.

    Attributes:
        number: the task's place, from 1.
        count: evaluations so far, earlier runs' included.
        best_ms: the least time measured in this run.
        spent: seconds of device time that this run gave it.
        measuring: candidates that are on the device.
        final: its final round, once the search is over.

    Args:
        deadline: when its share of the time is over; None: no limit.
        end: when the whole run's time is over; None: no limit.
        grace: seconds after that for which its first result is waited for; None: `GRACE_S`.
    """

    def __init__(
        self,
        search: Search,
        budget: Budget,
        number: int,
        deadline: float | None,
        end: float | None,
        grace: float | None = None,
    ) -> None:
        self.search = search
        self.task = search.task
        self.number = number
        self.count = self._first = len(search.measured())
        self.best_ms: float | None = None
        self.spent = 0.0
        self.measuring = 0
        self.final: FinalRound | None = None
        self._budget, self._deadline, self._end = budget, deadline, end
        self._grace = GRACE_S if grace is None else grace
        self._pending: deque[Candidate] = deque()
        self._ended = search.finished(budget)
        self._exhausted = False
        self._begun = False

    def over(self) -> str:
        """Why the search is over with nothing left on the device; empty otherwise."""
        return "" if self.measuring else self._why()

    def _why(self) -> str:
        """Why no more should be measured; empty otherwise."""
        now = time.monotonic()
        late = self._deadline is not None and now > self._deadline
        hopeless = self._end is not None and now > self._end + self._grace
        if not self._ended and late and (self.count > self._first or hopeless):
            self._ended = "its time is up"
        if self._exhausted and not self._pending:
            return self._ended or "every schedule is measured"
        return self._ended

    @property
    def pending(self) -> int:
        """How many schedules are compiling or waiting for the device."""
        return len(self._pending)

    def has_room(self, most: int) -> bool:
        """Whether fewer than `most` schedules are pending and more can be asked for."""
        room = min(most, self._budget.trials - self.count - self.measuring)
        return not self._exhausted and len(self._pending) < room and not self._why()

    def ask(self) -> Candidate | None:
        """A schedule to compile; None when all have been asked for."""
        candidate = self.search.ask()
        if candidate is None:
            self._exhausted = True
        else:
            self._pending.append(candidate)
        return candidate

    def next(self, evaluator: Evaluator) -> Candidate | None:
        """The most promising compiled schedule; from now on it is on the device.

        The first is always the one asked for first: all other outputs must agree with its own.
        """
        if self._why():
            return None
        ready = [c for c in self._pending if evaluator.ready(self.task, c.schedule)]
        if not self._begun:
            ready = [c for c in ready if c is self._pending[0]]
        if not ready:
            return None
        chosen = min(ready, key=lambda c: evaluator.promise(self.task, c.schedule))
        self._pending.remove(chosen)
        self._begun = True
        self.measuring += 1
        return chosen

    def tell(self, candidate: Candidate, outcome: Outcome) -> None:
        """Record what the device found."""
        self.measuring -= 1
        self.count += self.search.tell(candidate, outcome)
        if outcome.ms is not None:
            self.best_ms = outcome.ms if self.best_ms is None else min(self.best_ms, outcome.ms)
        self._ended = self.search.finished(self._budget)

    def give_up(self, running: dict[int, Any]) -> None:
        """Leave what was asked for but not measured to a later search."""
        for candidate in self._pending:
            running.pop(candidate.trial._trial_id, None)
        self._pending.clear()
        self.search.give_up()
