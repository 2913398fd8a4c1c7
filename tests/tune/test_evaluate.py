"""The timed evaluator: inputs that cannot be made do not cost each schedule a try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsagen.codegen.target import KNOWN_TARGETS
from nsagen.tune.compiler import CompilePool
from nsagen.tune.evaluate import OPEN_ATTEMPTS, TimedEvaluator
from nsagen.tune.task import tasks_of
from nsagen.tune.worker import Reply
from nsagen.workload import Workload
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
