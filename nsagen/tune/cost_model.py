"""The static objective: ranks schedules by the cost model alone; nothing runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from nsagen.core.workload import Schedule
from nsagen.tune.compiler import CompilePool
from nsagen.tune.cost import static_cost
from nsagen.tune.evaluate import Candidates, Final, candidates_for
from nsagen.tune.outcome import Outcome
from nsagen.tune.task import Task


class StaticEvaluator:
    """Compiles and ranks schedules."""

    def __init__(self, pool: CompilePool) -> None:
        self._pool = pool

    def candidates(self, task: Task) -> Candidates:
        return candidates_for(task.workload, self._pool.target)

    def start(self, task: Task, schedule: Schedule) -> None:
        self._pool.start(task, schedule)

    def ready(self, task: Task, schedule: Schedule) -> bool:
        return self._pool.done(task, schedule)

    def promise(self, task: Task, schedule: Schedule) -> float:
        return 0.0

    def finish(self, task: Task, schedule: Schedule, best_ms: float | None) -> Outcome:
        compiled = self._pool.finish(task, schedule)
        if compiled.reason:
            return compiled
        return replace(compiled, ms=static_cost(compiled.kernels, self._pool.target))

    def finals(self, task: Task, schedules: Sequence[Schedule]) -> list[Final]:
        outcomes = [self.finish(task, schedule, None) for schedule in schedules]
        return [
            Final(s, math.inf if o.ms is None else o.ms, reason=o.reason)
            for s, o in zip(schedules, outcomes, strict=True)
        ]

    def start_last(self, task: Task, schedule: Schedule) -> None:
        pass

    def last_ready(self, task: Task, schedule: Schedule) -> bool:
        return True

    def certify(self, task: Task, schedule: Schedule) -> str:
        return ""

    def close(self) -> None:
        self._pool.close()
