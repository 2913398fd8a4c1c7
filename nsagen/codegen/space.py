"""Schedule spaces: every valid schedule of an algorithm, declared beside its template.

A space lists its knobs, their values and what each trades, the rules that a valid
schedule obeys, and the default for a target. Only a space knows its knobs by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nsagen.core.errors import BuildError, UnsupportedWorkloadError
from nsagen.core.releases import Release, Releases
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


@dataclass(frozen=True)
class Knob:
    """A knob with an explicit list of values, in ascending or preference order."""

    name: str
    values: tuple[Param, ...]
    trades: str


def PowerOfTwo(name: str, low: int, high: int, trades: str) -> Knob:
    """A knob over the powers of two from `low` to `high`, both inclusive."""
    values = tuple(1 << e for e in range(low.bit_length() - 1, high.bit_length()))
    if values[0] != low or values[-1] != high:
        raise ValueError(f"knob {name}: low and high must be powers of two, got {low} and {high}")
    return Knob(name, values, trades)


@dataclass(frozen=True)
class Rule:
    """A condition that every valid schedule meets; `text` describes a violation."""

    text: str
    holds: Callable[[Workload, Schedule, Target], bool]


def _nothing(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    return {}


def _no_shared_memory(workload: Workload, schedule: Schedule) -> int:
    return 0


def _no_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    return 0


def _any_workload(workload: Workload) -> bool:
    return True


def _any_target(target: Target) -> bool:
    return True


def _always(workload: Workload, target: Target) -> bool:
    return True


@dataclass(frozen=True)
class ScheduleSpace:
    """Every valid schedule of one algorithm of an op's pass.

    Attributes:
        derive: arithmetic for the template, done in Python: (workload, schedule) -> names.
        shared_memory: bytes of a program's tiles, at most.
        scratch: bytes that a target's compiler takes beside them, at most: for reductions, barriers
            and tiles in a second layout. With the tiles, they must fit the target.
        default: knob values to use when nothing was measured.
        supports: whether the algorithm covers a workload at all.
        runs_on: whether it compiles for a target; some targets lack what it is built on.
        triton: the releases of Triton that it runs with; None means all that nsagen supports.
        preferred: whether to use it before the others when nothing was measured. Among
            preferred ones, those for particular targets come first.
    """

    op: str
    pass_: str
    algorithm: str
    knobs: tuple[Knob, ...]
    default: Callable[[Workload, Target], Mapping[str, Param]]
    rules: tuple[Rule, ...] = ()
    derive: Callable[[Workload, Schedule], dict[str, Any]] = _nothing
    shared_memory: Callable[[Workload, Schedule], int] = _no_shared_memory
    scratch: Callable[[Workload, Schedule, Target], int] = _no_scratch
    supports: Callable[[Workload], bool] = _any_workload
    runs_on: Callable[[Target], bool] = _any_target
    triton: Releases | None = None
    preferred: Callable[[Workload, Target], bool] = _always

    @property
    def general(self) -> bool:
        """Whether the algorithm runs on every target."""
        return self.runs_on is _any_target

    def runs_with(self, release: Release | None) -> bool:
        """Whether the algorithm runs with a release of Triton; None means one it runs with."""
        return self.triton is None or release is None or release in self.triton

    @property
    def template(self) -> str:
        """Path of the template below the templates folder."""
        return f"{self.op}/{self.pass_}_{self.algorithm}.py.j2"

    def memory_on(self, workload: Workload, schedule: Schedule, target: Target) -> int:
        """Bytes of shared memory that a program takes on a target, at most."""
        return self.shared_memory(workload, schedule) + self.scratch(workload, schedule, target)

    def violations(self, workload: Workload, schedule: Schedule, target: Target) -> list[str]:
        """What forbids this schedule, in words; empty when it is valid."""
        if wrong := self._unknown_values(schedule):
            return wrong
        if not self.runs_on(target):
            return [f"algorithm {self.algorithm} does not run on {target}"]
        wrong = [rule.text for rule in self.rules if not rule.holds(workload, schedule, target)]
        needed = self.memory_on(workload, schedule, target)
        if needed > target.shared_memory:
            limit = target.shared_memory
            wrong.append(f"needs about {needed} bytes of shared memory, {target} has {limit}")
        return wrong

    def fits(self, workload: Workload, schedule: Schedule, target: Target) -> bool:
        """Whether a schedule of known values has no `violations` on a target that it runs on."""
        return (
            all(rule.holds(workload, schedule, target) for rule in self.rules)
            and self.memory_on(workload, schedule, target) <= target.shared_memory
        )

    def _unknown_values(self, schedule: Schedule) -> list[str]:
        """Which knobs are missing, foreign to this algorithm, or have a value they cannot have."""
        values = dict(schedule.knobs)
        wrong = [
            f"knob {knob.name} must be one of {list(knob.values)}, got {values.get(knob.name)!r}"
            for knob in self.knobs
            if values.get(knob.name) not in knob.values
            or isinstance(values[knob.name], bool) != isinstance(knob.values[0], bool)  # True == 1
        ]
        unknown = sorted(values.keys() - {knob.name for knob in self.knobs})
        return wrong + [f"knob {name} is not one of this algorithm's" for name in unknown]

    def default_schedule(self, workload: Workload, target: Target) -> Schedule:
        """The schedule to use when nothing was measured: the default, made to fit the target.

        If the default breaks a rule or needs too much shared memory, one knob changes by one value
        at a time, later knobs first, as long as that fixes a rule or needs less.

        Raises:
            BuildError: the default has a knob or value that the space lacks: a bug in the space.
            UnsupportedWorkloadError: no single-knob change fixes a rule or saves enough memory.
        """
        schedule = Schedule.of(self.algorithm, self.default(workload, target))
        if wrong := self._unknown_values(schedule):
            raise BuildError(
                f"{workload}, {target}: the default schedule must have known knobs; "
                f"got {schedule}: {'; '.join(wrong)}; fix `default` in templates/{self.op}"
            )
        while self.violations(workload, schedule, target):
            excess = self._excess(workload, schedule, target)
            near = (n for n in self._near(schedule) if self._excess(workload, n, target) < excess)
            smaller = next(near, None)
            if smaller is None:
                break
            schedule = smaller
        if violations := self.violations(workload, schedule, target):
            wrong = "; ".join(violations)
            raise UnsupportedWorkloadError(
                f"{workload}, {target}: {self.algorithm} must have a valid schedule; "
                f"the nearest to its default is {schedule}: {wrong}; choose another algorithm"
            )
        return schedule

    def _excess(self, workload: Workload, schedule: Schedule, target: Target) -> tuple[int, int]:
        """How many rules a schedule of known knob values breaks, and the memory it needs."""
        broken = sum(not rule.holds(workload, schedule, target) for rule in self.rules)
        return broken, self.memory_on(workload, schedule, target)

    def _near(self, schedule: Schedule) -> Iterator[Schedule]:
        """The schedules one value away, later knobs first and lower values first."""
        values = dict(schedule.knobs)
        for knob in reversed(self.knobs):
            place = knob.values.index(values[knob.name])
            for other in (place - 1, place + 1):
                if 0 <= other < len(knob.values):
                    yield Schedule.of(self.algorithm, values, **{knob.name: knob.values[other]})

    def schedules(self, workload: Workload, target: Target) -> Iterator[Schedule]:
        """All valid schedules, in the order of the knobs' values."""
        names = [knob.name for knob in self.knobs]
        for values in itertools.product(*(knob.values for knob in self.knobs)):
            schedule = Schedule.of(self.algorithm, dict(zip(names, values, strict=True)))
            if self.fits(workload, schedule, target):
                yield schedule


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
