"""Encodes schedules as parameters of a study, and decodes a sampler's proposals.

A schedule space is small enough to list, or a large sample of it is. A study's parameters are the
union of all algorithms' knobs, each with static choices. A proposal that is invalid or already
measured moves to the nearest listed schedule that is neither. So no evaluation is spent on what
the rules exclude, and no schedule is evaluated twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from nsagen.codegen.space import ScheduleSpace
from nsagen.codegen.template import spaces_of
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.releases import installed_release
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

Kind = Literal["integer", "categorical"]
"""Ordered knobs as the index of their value, or every knob as one of unordered choices."""

LISTED, SAMPLED, DRAWN = 20_000, 4096, 50_000
"""Most combinations of an algorithm's knobs that are all listed; beyond that, most valid ones of a
sample, and most combinations drawn to find them: in some spaces, one in a hundred is valid."""

Coded = int | str
"""A parameter's value in a study."""


class Encoding:
    """The parameters of a study over a list of valid schedules of a workload.

    Attributes:
        schedules: the list, in a fixed order; schedules that a study adds follow.
        distributions: parameter -> its choices, the same throughout a study.
        sha256: hash of the parameters and their choices.
    """

    def __init__(self, schedules: Sequence[Schedule], kind: Kind = "integer") -> None:
        self.schedules = list(schedules)
        self.kind: Kind = kind
        self._values = _values_of(schedules)
        self._knobs = {s.algorithm: [name for name, _ in s.knobs] for s in schedules}
        self._ordered = {
            name: kind == "integer" and all(type(value) is int for value in values)
            for name, values in self._values.items()
        }
        self.distributions = {name: self._distribution(name) for name in self._values}
        self._rank = {schedule: rank for rank, schedule in enumerate(self.schedules)}
        self._columns = _Columns(self._values, self._ordered)
        self.points = self._columns.points([self._indices(s) for s in self.schedules])
        text = json.dumps({n: str(d) for n, d in self.distributions.items()}, sort_keys=True)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.schedules)

    def rank_of(self, schedule: Schedule) -> int:
        """A schedule's place in the list; adds it if it is missing."""
        if schedule not in self._rank:
            self._rank[schedule] = len(self.schedules)
            self.schedules.append(schedule)
            point = self._columns.points([self._indices(schedule)])
            self.points = np.concatenate([self.points, point])
        return self._rank[schedule]

    def expresses(self, schedule: Schedule) -> bool:
        """Whether the parameters have a value for each of a schedule's knobs."""
        known = self._knobs.get(schedule.algorithm)
        return known == [name for name, _ in schedule.knobs] and all(
            value in self._values[name] for name, value in schedule.knobs
        )

    def params_of(self, schedule: Schedule) -> dict[str, Coded]:
        """A schedule's parameters; a knob that its algorithm lacks takes its first value."""
        indices = zip(self._values, self._indices(schedule), strict=True)
        return {name: self._code(name, index) for name, index in indices}

    def schedule_of(self, params: Mapping[str, Coded]) -> Schedule:
        """The schedule that parameters stand for; it may be unlisted or invalid."""
        values = {name: self._value(name, params[name]) for name in self._values}
        algorithm = str(values["algorithm"])
        return Schedule.of(algorithm, {name: values[name] for name in self._knobs[algorithm]})

    def nearest(
        self, params: Mapping[str, Coded], taken: Collection[Schedule], seed: int
    ) -> Schedule | None:
        """The untaken listed schedule nearest to a proposal; ties are drawn at random."""
        free = self.free(taken)
        if not len(free):
            return None
        indices = [self._index(name, params[name]) for name in self._values]
        apart = ((self.points[free] - self._columns.points([indices])) ** 2).sum(1)
        best = free[apart <= apart.min() + 1e-9]
        return self.schedules[np.random.default_rng(seed).choice(best)]

    def random(self, taken: Collection[Schedule], seed: int) -> Schedule | None:
        """A schedule drawn evenly from the untaken ones; None when all are taken."""
        free = self.free(taken)
        return self.schedules[np.random.default_rng(seed).choice(free)] if len(free) else None

    def free(self, taken: Collection[Schedule]) -> NDArray[np.intp]:
        """Ranks of the untaken schedules."""
        ranks = [self.rank_of(schedule) for schedule in taken]
        free = np.ones(len(self.schedules), dtype=bool)
        free[ranks] = False
        return np.flatnonzero(free)

    def _indices(self, schedule: Schedule) -> list[int]:
        values = {"algorithm": schedule.algorithm, **dict(schedule.knobs)}
        return [
            known.index(values[name]) if name in values else 0
            for name, known in self._values.items()
        ]

    def _distribution(self, name: str) -> BaseDistribution:
        values = self._values[name]
        if self._ordered[name]:
            return IntDistribution(0, len(values) - 1)
        return CategoricalDistribution([str(value) for value in values])

    def _code(self, name: str, index: int) -> Coded:
        return index if self._ordered[name] else str(self._values[name][index])

    def _index(self, name: str, code: Coded) -> int:
        if self._ordered[name]:
            return int(code)
        return [str(value) for value in self._values[name]].index(str(code))

    def _value(self, name: str, code: Coded) -> Param:
        return self._values[name][self._index(name, code)]


@dataclass(frozen=True)
class _Columns:
    """Points in 0..1 for lists of indices: one column per ordered knob, one per other choice."""

    values: Mapping[str, tuple[Param, ...]]
    ordered: Mapping[str, bool]

    def points(self, indices: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        table = np.array(indices, dtype=np.float64)
        columns = [np.zeros((len(table), 1))]  # for a space of one schedule
        for place, (name, values) in enumerate(self.values.items()):
            index = table[:, place : place + 1]
            if len(values) > 1 and self.ordered[name]:
                columns.append(index / (len(values) - 1))
            elif len(values) > 1:
                columns.append((index == np.arange(len(values))) * 0.5**0.5)
        return np.concatenate(columns if len(columns) == 1 else columns[1:], axis=1)


def combinations(workload: Workload, target: Target) -> int:
    """Number of knob combinations, valid or not, of a workload's algorithms on a target."""
    return sum(_combinations(space) for space in _spaces(workload, target))


def _spaces(workload: Workload, target: Target) -> list[ScheduleSpace]:
    spaces = spaces_of(workload.op, workload.pass_)
    release = installed_release()
    return [
        space
        for space in spaces
        if space.supports(workload) and space.runs_on(target) and space.runs_with(release)
    ]


def _combinations(space: ScheduleSpace) -> int:
    return math.prod(len(knob.values) for knob in space.knobs)


def valid_schedules(workload: Workload, target: Target) -> tuple[Schedule, ...]:
    """Valid schedules of every algorithm that covers the workload and runs on the target.

    All of them or, for an algorithm with very many, a fixed random sample and its default.
    """
    listed: list[Schedule] = []
    for space in _spaces(workload, target):
        listed += (
            space.schedules(workload, target)
            if _combinations(space) <= LISTED
            else _sample(space, workload, target, _combinations(space))
        )
    return tuple(listed)


def _sample(
    space: ScheduleSpace, workload: Workload, target: Target, size: int
) -> Iterator[Schedule]:
    default = None
    with contextlib.suppress(UnsupportedWorkloadError):  # no default may fit
        default = space.default_schedule(workload, target)
    if default:
        yield default
    draw, seen = random.Random(f"{workload} {space.algorithm}"), set[int]()
    found = int(default is not None)
    most = min(DRAWN, size // 2)  # later draws would mostly repeat
    while found < SAMPLED and len(seen) < most:
        number = draw.randrange(size)
        if number in seen:
            continue
        seen.add(number)
        knobs: dict[str, Param] = {}
        for knob in space.knobs:
            number, index = divmod(number, len(knob.values))
            knobs[knob.name] = knob.values[index]
        schedule = Schedule.of(space.algorithm, knobs)
        if schedule != default and space.fits(workload, schedule, target):
            yield schedule
            found += 1


def _values_of(schedules: Sequence[Schedule]) -> dict[str, tuple[Param, ...]]:
    """Parameter -> the values that occur: numbers ascending, others in order of occurrence."""
    found: dict[str, dict[Param, None]] = {"algorithm": {}}
    for schedule in schedules:
        found["algorithm"].setdefault(schedule.algorithm)
        for name, value in schedule.knobs:
            found.setdefault(name, {}).setdefault(value)
    return {
        name: tuple(sorted(values)) if all(type(v) is int for v in values) else tuple(values)
        for name, values in found.items()
    }
