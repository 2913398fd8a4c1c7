"""The time of a run, by a clock that only compiling and listing move."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import optuna
import pytest

from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.records.record import TuningRecord
from nsagen.tune import encoding, open_search, settings, tuner
from nsagen.tune.evaluate import Candidates, Final, candidates_for
from nsagen.tune.outcome import Outcome
from nsagen.tune.settings import Device, Settings
from nsagen.tune.task import Task, fingerprint_or_none, tasks_of

TARGET = KNOWN_TARGETS["cuda:90"]
DEVICE = Device("static-cuda-90", TARGET, "none", "triton 3.6.0")


class Clock:
    """`time` of the tuner's modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(monotonic=lambda: self.now, sleep=self.pass_)
        for module in (tuner, open_search):
            monkeypatch.setattr(module, "time", fake)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Compilers:
    """Ranks schedules; each takes so many seconds, one after the other."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self.begun: list[Task] = []
        self.ended: list[Task] = []

    def candidates(self, task: Task) -> Candidates:
        return candidates_for(task.workload, TARGET)

    def start(self, task: Task, schedule: Schedule) -> None:
        self.begun.append(task)

    def ready(self, task: Task, schedule: Schedule) -> bool:
        return True

    def promise(self, task: Task, schedule: Schedule) -> float:
        return 0.0

    def finish(self, task: Task, schedule: Schedule, best_ms: float | None) -> Outcome:
        self._clock.pass_(self._seconds)
        self.ended.append(task)
        return Outcome(ms=1.0, fingerprint=fingerprint_or_none(task, schedule) or "")

    def finals(self, task: Task, schedules: list[Schedule]) -> list[Final]:
        return [Final(schedule, 1.0) for schedule in schedules]

    def start_last(self, task: Task, schedule: Schedule) -> None:
        pass

    def last_ready(self, task: Task, schedule: Schedule) -> bool:
        return True

    def certify(self, task: Task, schedule: Schedule) -> str:
        return ""

    def close(self) -> None:
        pass


def tasks(count: int) -> list[Task]:
    sizes = {"head_dim": 32, "kernel_size": 8, "compress_type": "avgpool"}
    shapes = [
        Workload.of(
            "compress", "forward", dtype="float16", **sizes, kernel_stride=stride, with_pe=with_pe
        )
        for stride in (1, 2, 4, 8)
        for with_pe in (False, True)
    ]
    return list(tasks_of(shapes))[:count]


def ranked(
    clock: Clock, seconds_each: float, count: int, loaded: float = 0.0
) -> tuple[Compilers, list[TuningRecord], list[str]]:
    limits = Settings("static", seconds=120.0, ahead=3, each=1, one_first=True, since=clock.now)
    clock.pass_(loaded)
    compilers, records = Compilers(clock, seconds_each), list[TuningRecord]()
    storage = optuna.storages.InMemoryStorage()
    run = tuner.Tuner(DEVICE, storage, compilers, limits)  # type: ignore[arg-type]
    failures = run.run(tasks(count), records.append)
    return compilers, records, failures


def test_every_task_gets_a_schedule_before_one_gets_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    compilers, records, failures = ranked(clock, 6.0, 16)
    assert not failures
    assert len({record.key for record in records}) == len({*compilers.ended[:16]}) == 16
    assert clock.now <= 1120.0
    assert len({*compilers.begun[:16]}) == 16  # none compiles in vain before all have one


def test_what_time_is_left_goes_to_more_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    compilers, records, _ = ranked(clock, 1.0, 16)
    assert len({*compilers.ended[:16]}) == 16
    assert 16 < len(records) <= 32  # a record again where more is known
    assert 80 < len(compilers.ended) <= 112
    assert max(Counter(compilers.ended).values()) <= 4 * min(Counter(compilers.ended).values())
    assert clock.now <= 1120.0


def test_loading_is_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    _, records, failures = ranked(clock, 4.0, 16, loaded=60.0)
    assert clock.now <= 1120.0
    assert 0 < len(records) < 16
    assert len(records) + len(failures) == 16
    assert all("the same command goes on from here" in line for line in failures)


def test_a_large_space_is_listed_from_a_bounded_number_of_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where one combination in a hundred is valid, half of all were tried: a minute a workload."""
    (space,) = (
        s for s in encoding._spaces(LINEAR, TARGET) if encoding._combinations(s) > encoding.LISTED
    )
    tried = []
    real = type(space).fits

    def counting(self: object, *args: object) -> bool:
        tried.append(args)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(space), "fits", counting)
    found = encoding.valid_schedules(LINEAR, TARGET)
    assert len(tried) <= encoding.DRAWN
    assert len(found) >= 200  # as many as a search tries
    assert not any(space.violations(LINEAR, s, TARGET) for s in found)


LINEAR = Workload.of(
    "compress",
    "backward",
    dtype="float16",
    head_dim=32,
    kernel_size=8,
    kernel_stride=4,
    compress_type="linear",
    with_pe=True,
)


def test_settings_end_when_their_time_is_over() -> None:
    assert Settings().end() is None
    assert settings.Settings(seconds=100.0, since=5.0).end(reserve=0.1) == pytest.approx(95.0)
