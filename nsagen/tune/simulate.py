"""Replays a recording: a search on a GPU that was measured before, without the GPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from nsagen.core.workload import Schedule
from nsagen.tune.evaluate import Candidates, Final, final_of
from nsagen.tune.outcome import Outcome
from nsagen.tune.recording import Recording
from nsagen.tune.task import Task


class ReplayEvaluator:
    """Gives the outcomes of a recording, noise included: a time is one of the repeats.

    Args:
        seed: decides which repeat a schedule gets.
    """

    def __init__(self, recording: Recording, seed: int = 0) -> None:
        self._recording = recording
        self._seed = seed

    def candidates(self, task: Task) -> Candidates:
        outcomes = self._recording.outcomes
        default, others = self._recording.default, self._recording.others
        return Candidates(tuple(outcomes), default, others, outcomes.__contains__)

    def start(self, task: Task, schedule: Schedule) -> None:
        pass

    def ready(self, task: Task, schedule: Schedule) -> bool:
        return True

    def promise(self, task: Task, schedule: Schedule) -> float:
        return 0.0

    def finish(self, task: Task, schedule: Schedule, best_ms: float | None) -> Outcome:
        outcome = self._recording.outcomes[schedule]
        if not outcome.repeats:
            return outcome
        drawn = random.Random(f"{self._seed} {schedule}").choice(outcome.repeats)
        return replace(outcome, ms=drawn)

    def finals(self, task: Task, schedules: Sequence[Schedule]) -> list[Final]:
        finals = []
        for schedule in schedules:
            outcome = self._recording.outcomes[schedule]
            rounds = (self._recording.true_ms(schedule),) if outcome.ok else ()
            finals.append(final_of(schedule, rounds, outcome.reason))
        return finals

    def start_last(self, task: Task, schedule: Schedule) -> None:
        pass

    def last_ready(self, task: Task, schedule: Schedule) -> bool:
        return True

    def certify(self, task: Task, schedule: Schedule) -> str:
        return ""

    def close(self) -> None:
        pass
