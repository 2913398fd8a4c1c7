"""The timed evaluator: inputs that cannot be made do not cost each schedule a try."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.worker import Reply
from nsagen.core.workload import Schedule, Workload
from nsagen.tune import evaluate
from nsagen.tune.compiler import FIRST, Compiled, CompilePool
from nsagen.tune.evaluate import (
    MEASURE_LIMIT_S,
    OPEN_ATTEMPTS,
    TimedEvaluator,
    candidates_for,
)
from nsagen.tune.task import tasks_of
from tests.tune.conftest import InlineWorker, World
from tests.tune.fake import FakeCompiler, FakeMeasurer

WORKLOAD = Workload.of("gated_sum", "forward", dtype="float16", v_head_dim=32)


class Forgetful(InlineWorker):
    """Cannot open the task of 4096 tokens, and notes what it is asked."""

    def __init__(self) -> None:
        super().__init__(FakeMeasurer())
        self.opened: list[int] = []

    def ask(self, method: str, *args: Any, limit_s: float) -> Reply:
        if method == "open":
            self.opened.append(args[0].timed.tokens)
            if args[0].timed.tokens == 4096:
                return Reply(reason="hang: no answer in 180 s")
        return super().ask(method, *args, limit_s=limit_s)


def test_a_task_that_cannot_be_opened_is_given_up(world: World, tmp_path: Path) -> None:
    worker = Forgetful()
    pool = CompilePool(tmp_path, KNOWN_TARGETS["cuda:90"], [InlineWorker(FakeCompiler())])  # type: ignore[list-item]
    evaluator = TimedEvaluator(pool, worker)  # type: ignore[arg-type]
    good, bad = tasks_of([WORKLOAD], seqlens=[1024, 4096])
    schedules = evaluator.candidates(bad).schedules[:4]
    for schedule in schedules:
        assert evaluator.finish(good, schedule, None).ok
        reason = evaluator.finish(bad, schedule, None).reason
        assert reason == "inputs: hang: no answer in 180 s"
    assert worker.opened.count(4096) == OPEN_ATTEMPTS
    assert worker.opened.count(1024) == OPEN_ATTEMPTS + 1
    evaluator.close()


def test_inputs_that_take_too_long_do_not_outlast_the_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is up, each task has one more short attempt."""
    limits, now = list[float](), [1000.0]

    class Slow(InlineWorker):
        def ask(self, method: str, *args: Any, limit_s: float) -> Reply:
            if method == "open":
                limits.append(limit_s)
                now[0] += limit_s
                return Reply(reason=f"hang: no answer in {limit_s:.0f} s")
            return super().ask(method, *args, limit_s=limit_s)

    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now[0])
    pool = CompilePool(tmp_path, KNOWN_TARGETS["cuda:90"], [InlineWorker(FakeCompiler())])  # type: ignore[list-item]
    evaluator = TimedEvaluator(pool, Slow(FakeMeasurer()), end=time.monotonic() + 60.0)  # type: ignore[arg-type]
    tasks = tasks_of([WORKLOAD], seqlens=[1024, 4096])
    for task in tasks:
        for schedule in evaluator.candidates(task).schedules[:3]:
            assert evaluator.finish(task, schedule, None).reason.startswith("inputs: hang")
    assert limits == [60.0, MEASURE_LIMIT_S]
    evaluator.close()


def test_a_restarted_worker_gets_the_task_again(world: World, tmp_path: Path) -> None:
    worker = Forgetful()
    pool = CompilePool(tmp_path, KNOWN_TARGETS["cuda:90"], [InlineWorker(FakeCompiler())])  # type: ignore[list-item]
    evaluator = TimedEvaluator(pool, worker)  # type: ignore[arg-type]
    (task,) = tasks_of([WORKLOAD], seqlens=[1024])
    first, second = evaluator.candidates(task).schedules[:2]
    assert evaluator.finish(task, first, None).ok
    worker.starts += 1
    assert evaluator.finish(task, second, None).ok
    assert worker.opened == [1024, 1024]
    evaluator.close()


class OneKernel(FakeCompiler):
    """Every schedule of the same block compiles to the same binary."""

    def compile(self, path: Path, workload: Any, schedule: Schedule, *rest: Any) -> Compiled:
        return replace(
            super().compile(path, workload, schedule, *rest), identity=str(schedule.block)
        )


def test_schedules_that_are_one_are_measured_once(world: World, tmp_path: Path) -> None:
    asked: list[str] = []

    class Noting(InlineWorker):
        def ask(self, method: str, *args: Any, limit_s: float) -> Reply:
            asked.append(method)
            return super().ask(method, *args, limit_s=limit_s)

    pool = CompilePool(tmp_path, KNOWN_TARGETS["cuda:90"], [InlineWorker(OneKernel())])  # type: ignore[list-item]
    evaluator = TimedEvaluator(pool, Noting(FakeMeasurer()))  # type: ignore[arg-type]
    (task,) = tasks_of([WORKLOAD], seqlens=[1024])
    by_block: dict[int, list[Schedule]] = {}
    for schedule in evaluator.candidates(task).schedules:
        by_block.setdefault(schedule.block, []).append(schedule)
    (first, second, *_), (other, *_), *_ = (g for g in by_block.values() if len(g) > 1)
    known, twin = (evaluator.finish(task, schedule, None) for schedule in (first, second))
    assert (twin.ms, twin.repeats, twin.twin) == (known.ms, known.repeats, str(first))
    assert not known.twin
    assert not evaluator.finish(task, other, None).twin
    assert asked.count("measure") == 2
    evaluator.close()


def test_small_sizes_are_compiled_for_the_first_ones_and_a_winner(
    world: World, tmp_path: Path
) -> None:
    """The first meets the reference there; the others must agree with it at the timed sizes."""
    compiled: list[int] = []

    class Counting(FakeCompiler):
        def compile(self, *args: Any) -> Compiled:
            compiled.append(len(args[-1]))
            return super().compile(*args)

    pool = CompilePool(tmp_path, KNOWN_TARGETS["cuda:90"], [InlineWorker(Counting())])  # type: ignore[list-item]
    (task,) = tasks_of([WORKLOAD], seqlens=[1024])
    schedules = candidates_for(WORKLOAD, KNOWN_TARGETS["cuda:90"]).schedules[:5]
    for schedule in schedules:
        assert not pool.finish(task, schedule).reason
    assert compiled == [2] * FIRST + [1] * (5 - FIRST)
    assert not pool.last_done(task, schedules[4])
    assert pool.finish_last(task, schedules[4]) == ""
    assert pool.last_done(task, schedules[4])
    assert compiled[-1] == 2
    pool.close()
