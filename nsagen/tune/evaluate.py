"""Evaluators: the source of a schedule's outcome. A search does not know which one it has."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nsagen.codegen.template import default_schedule, rendered, space_for
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.releases import installed_release
from nsagen.core.target import Target
from nsagen.core.worker import Reply, Worker
from nsagen.core.workload import Schedule, Workload
from nsagen.tune.compiler import CompilePool, check_system
from nsagen.tune.cost import static_cost
from nsagen.tune.encoding import valid_schedules
from nsagen.tune.outcome import Outcome, Timing
from nsagen.tune.task import Task

OPEN_LIMIT_S = 180.0
MEASURE_LIMIT_S = 20.0
OPEN_ATTEMPTS = 2
ROUNDS = 9


@dataclass(frozen=True)
class Final:
    """A finalist, timed in turn with the others.

    Attributes:
        ms: median over the rounds.
        rounds: the median of each round; empty without rounds.
        reason: why it is out of the race; empty if it is still in.
    """

    schedule: Schedule
    ms: float
    rounds: tuple[float, ...] = ()
    reason: str = ""

    @property
    def spread(self) -> float:
        """(Slowest - fastest round) / median."""
        return (max(self.rounds) - min(self.rounds)) / self.ms if self.rounds else 0.0


@dataclass(frozen=True)
class Candidates:
    """What a task can choose from.

    Attributes:
        schedules: every valid schedule.
        default: the one to use when nothing is known.
        others: the defaults of the other algorithms, so that a search need not find them by chance.
        allows: whether a schedule, listed or not, is valid.
    """

    schedules: tuple[Schedule, ...]
    default: Schedule
    others: tuple[Schedule, ...]
    allows: Callable[[Schedule], bool]


@functools.cache
def candidates_for(workload: Workload, target: Target) -> Candidates:
    """What a workload's schedule spaces offer on a target with the installed Triton.

    Raises:
        BuildError: a template is missing or does not render.
    """
    schedules = valid_schedules(workload, target)
    algorithms = sorted({schedule.algorithm for schedule in schedules})

    def allows(schedule: Schedule) -> bool:
        if schedule.algorithm not in algorithms:
            return False
        space = space_for(workload, schedule.algorithm)
        return not space.violations(workload, schedule, target)

    default = default_schedule(workload, target, installed_release())
    others = []
    for algorithm in algorithms:
        if algorithm != default.algorithm:
            with contextlib.suppress(UnsupportedWorkloadError):  # no default may fit
                others.append(space_for(workload, algorithm).default_schedule(workload, target))
    for schedule in (default, *others):
        rendered(workload, schedule)  # a template that is missing or broken is no schedule's fault
    return Candidates(schedules, default, tuple(others), allows)


class Evaluator(Protocol):
    """Gives outcomes of schedules, and compares the best few in finals."""

    def candidates(self, task: Task) -> Candidates:
        """The schedules of a task."""
        ...

    def start(self, task: Task, schedule: Schedule) -> None:
        """Start what can be done ahead, without waiting."""
        ...

    def ready(self, task: Task, schedule: Schedule) -> bool:
        """Whether everything that was started for a schedule has ended."""
        ...

    def promise(self, task: Task, schedule: Schedule) -> float:
        """The ready schedule with the lowest value is measured next."""
        ...

    def finish(self, task: Task, schedule: Schedule, best_ms: float | None) -> Outcome:
        """Wait for a schedule's outcome."""
        ...

    def finals(self, task: Task, schedules: Sequence[Schedule]) -> list[Final]:
        """Compare the given schedules with more care; results are in the same order."""
        ...

    def start_last(self, task: Task, schedule: Schedule) -> None:
        """Start what `certify` needs, without waiting."""
        ...

    def last_ready(self, task: Task, schedule: Schedule) -> bool:
        """Whether `certify` need not wait for what was started."""
        ...

    def certify(self, task: Task, schedule: Schedule) -> str:
        """Why a schedule that is about to win must not win; empty if it may."""
        ...

    def close(self) -> None:
        """Release processes."""
        ...


class TimedEvaluator:
    """Compiles ahead in a pool and measures in a worker that holds the GPU.

    Args:
        end: by `time.monotonic`; making inputs is cut short where it would take longer.
    """

    def __init__(self, pool: CompilePool, worker: Worker, end: float | None = None) -> None:
        self._pool = pool
        self._worker = worker
        self._end = end
        self._opened: tuple[Task, int] | None = None
        self._unopened: dict[Task, list[str]] = {}
        self._measured: dict[tuple[Task, str], tuple[Schedule, Outcome]] = {}

    def candidates(self, task: Task) -> Candidates:
        return candidates_for(task.workload, self._pool.target)

    def start(self, task: Task, schedule: Schedule) -> None:
        self._pool.start(task, schedule)

    def ready(self, task: Task, schedule: Schedule) -> bool:
        return self._pool.done(task, schedule)

    def promise(self, task: Task, schedule: Schedule) -> float:
        return static_cost(self._pool.finish(task, schedule).kernels, self._pool.target)

    def finish(self, task: Task, schedule: Schedule, best_ms: float | None) -> Outcome:
        compiled = self._pool.finish(task, schedule)
        if compiled.reason:
            return compiled
        key = (task, compiled.identity)
        if compiled.identity and key in self._measured:
            twin, known = self._measured[key]
            return replace(compiled, **_result_of(known), twin=str(twin))
        reply = self._ask(task, "measure", self._pool.path_of(task, schedule), best_ms)
        if reply.reason:
            return replace(compiled, reason=reply.reason)
        timing = reply.value
        outcome = replace(compiled, **_result_of(timing))
        self._measured[key] = schedule, outcome
        return outcome

    def finals(self, task: Task, schedules: Sequence[Schedule]) -> list[Final]:
        compiled = [self._pool.finish(task, schedule) for schedule in schedules]
        able = [s for s, outcome in zip(schedules, compiled, strict=True) if not outcome.reason]
        paths = [self._pool.path_of(task, schedule) for schedule in able]
        reply = self._ask(task, "compare", paths, ROUNDS) if paths else Reply([])
        times = {} if reply.reason else dict(zip(able, reply.value, strict=True))
        return [
            final_of(schedule, times.get(schedule, ()), outcome.reason or reply.reason)
            for schedule, outcome in zip(schedules, compiled, strict=True)
        ]

    def start_last(self, task: Task, schedule: Schedule) -> None:
        self._pool.start_last(task, schedule)

    def last_ready(self, task: Task, schedule: Schedule) -> bool:
        return self._pool.last_done(task, schedule)

    def certify(self, task: Task, schedule: Schedule) -> str:
        reason = self._pool.finish_last(task, schedule)
        return reason or self._ask(task, "certify", self._pool.path_of(task, schedule)).reason

    def close(self) -> None:
        self._pool.close()
        self._worker.close()

    def _ask(self, task: Task, method: str, *args: object) -> Reply:
        """Ask the worker; a new worker, or one new to the task, gets the task first."""
        if self._opened != (task, self._worker.starts) or not self._worker.alive:
            failures = self._unopened.setdefault(task, [])
            left = OPEN_LIMIT_S if self._end is None else self._end - time.monotonic()
            if len(failures) >= (OPEN_ATTEMPTS if left > 0 else 1):
                return Reply(reason=f"inputs: {failures[-1]}")
            self._opened = None
            limit_s = max(MEASURE_LIMIT_S, min(OPEN_LIMIT_S, left))
            opened = self._worker.ask("open", task, limit_s=limit_s)
            check_system(opened)
            if opened.reason:
                failures.append(opened.reason)
                return Reply(reason=f"inputs: {opened.reason}")
            self._opened = (task, self._worker.starts)
        reply = self._worker.ask(method, *args, limit_s=MEASURE_LIMIT_S)
        check_system(reply)
        return reply


def _result_of(found: Outcome | Timing) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("ms", "spread", "error", "repeats")}


def final_of(schedule: Schedule, rounds: Sequence[float], reason: str = "") -> Final:
    """A finalist's median and spread over its rounds."""
    if reason or not rounds:
        reason = reason or "its outputs differ from the default's"
        return Final(schedule, float("inf"), reason=reason)
    return Final(schedule, statistics.median(rounds), tuple(rounds))
