"""A tuner's input: the device, how to search, and how to report progress."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nsagen.core.target import Target
from nsagen.core.workload import Schedule
from nsagen.records.record import Objective
from nsagen.tune.sampler import DEFAULT_SAMPLER
from nsagen.tune.search import Budget
from nsagen.tune.task import Task


@dataclass(frozen=True)
class Device:
    """What outcomes hold for: a device, or a target on which nothing ran."""

    slug: str
    target: Target
    driver: str
    triton: str


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        seconds: for all tasks together, from `since` on; None: no limit.
        ahead: schedules that compile while one is measured, over all searches together.
        each: of these, how many an open search has.
        one_first: where the time is limited, whether each task gets one schedule before any gets
            its share of the time.
        since: by `time.monotonic`; what was loaded and started from then on is part of the time.
    """

    objective: Objective = "time"
    budget: Budget = field(default_factory=Budget)
    seconds: float | None = None
    ahead: int = 1
    each: int = 3
    one_first: bool = False
    sampler: str = DEFAULT_SAMPLER
    seed: int = 0
    since: float = field(default_factory=time.monotonic)

    def end(self, reserve: float = 0.0) -> float | None:
        """When the time is up, but for a share of it that is reserved."""
        return None if self.seconds is None else self.since + self.seconds * (1 - reserve)


@dataclass(frozen=True)
class Step:
    """Progress: what was just evaluated.

    Attributes:
        number, tasks: the task's place, from 1, and how many there are.
        count, of: evaluations of the task so far, and its valid schedules.
    """

    task: Task
    number: int
    tasks: int
    count: int
    of: int
    schedule: Schedule
    reason: str
    ms: float | None
    best_ms: float | None
