"""The measurer on real kernels: on a GPU, or through Triton's interpreter with a plain clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsagen.cases.base import Case
from nsagen.cases.sizes import Sizes
from nsagen.codegen.template import kernel_name, render
from nsagen.core.bucket import Bucket
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.tune import measure
from nsagen.tune.encoding import valid_schedules
from nsagen.tune.measure import KEPT, GpuMeasurer
from nsagen.tune.outcome import WrongOutputError
from nsagen.tune.task import Task
from tests.support import kernel_device

WORKLOAD = Workload.of("gated_sum", "forward", dtype="float32", v_head_dim=16)
TASK = Task(WORKLOAD, Bucket(), Sizes((64,), 2), Sizes((32,), 2))
SCHEDULES = valid_schedules(WORKLOAD, KNOWN_TARGETS["cuda:90"])[:3]


class Measurer(GpuMeasurer):
    """GpuMeasurer where there is a GPU; else the same with a plain clock."""

    device = kernel_device()

    def _take_device(self) -> None:
        if self.device != "cpu":
            super()._take_device()

    def _warm(self, products: int) -> None:
        if self.device != "cpu":
            super()._warm(products)

    def _samples(self, call: Callable[[], Any], runs: int) -> list[float]:
        if self.device != "cpu":
            return super()._samples(call, runs)
        times = []
        for _ in range(min(runs, 3)):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


@dataclass
class Harness:
    """Gives one case for small sizes, and another for all others."""

    small: Case
    other: Case

    def make_case(self, workload: Workload, sizes: Sizes, *rest: object) -> Case:
        return self.small if sizes == TASK.checked else self.other


@pytest.fixture
def measurer() -> Measurer:
    made = Measurer()
    made.open(TASK)
    return made


def write(folder: Path, schedule: Schedule, change: Callable[[str], str] = lambda s: s) -> Path:
    path = folder / f"{kernel_name(WORKLOAD, schedule)}.py"
    path.write_text(change(render(WORKLOAD, schedule, "# a test")))
    return path


def test_a_right_kernel_gets_a_time(measurer: Measurer, tmp_path: Path) -> None:
    timing = measurer.measure(write(tmp_path, SCHEDULES[0]), None)
    assert timing.ms > 0
    assert 0 <= timing.error < 1e-5
    assert len(timing.repeats) == 3
    assert measurer.certify(write(tmp_path, SCHEDULES[0])) < 1e-5


def test_a_hopeless_kernel_is_timed_roughly(measurer: Measurer, tmp_path: Path) -> None:
    timing = measurer.measure(write(tmp_path, SCHEDULES[0]), best_ms=1e-6)
    assert len(timing.repeats) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda source: source.replace("tl.store(", "tl.static_assert(True) if True else tl.store("),
        lambda source: source.replace("def launch(", "def launch(*args):\n    pass\n\n\ndef _not("),
    ],
    ids=["a kernel that stores nothing", "a launch that does nothing"],
)
def test_outputs_of_another_kernel_do_not_help(
    measurer: Measurer, tmp_path: Path, change: Callable[[str], str]
) -> None:
    measurer.measure(write(tmp_path, SCHEDULES[0]), None)
    with pytest.raises(WrongOutputError, match="relative error inf"):
        measurer.measure(write(tmp_path, SCHEDULES[1], change), None)


def test_a_kernel_that_is_wrong_at_the_timed_sizes_only(measurer: Measurer, tmp_path: Path) -> None:
    """The reference is asked at small sizes; at the timed ones schedules must agree."""
    right = write(tmp_path, SCHEDULES[0])
    measurer.measure(right, None)

    def wrong_when_large(source: str) -> str:
        return source + (
            "\n\n_launch = launch\n\n\ndef launch(*args):\n    _launch(*args)\n"
            "    if args[-1].shape[0] > 32:\n        args[-1].mul_(1.001)\n"
        )

    wrong = write(tmp_path, SCHEDULES[1], wrong_when_large)
    with pytest.raises(WrongOutputError, match="relative error 1"):
        measurer.measure(wrong, None)
    times = measurer.compare([right, wrong, write(tmp_path, SCHEDULES[2])], rounds=3)
    assert [len(rounds) for rounds in times] == [3, 0, 3]


def test_the_reference_is_asked_once_a_task(
    measurer: Measurer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    assert measurer._now is not None
    case = measurer._now._inputs(TASK.checked, 0).case
    counting = replace(case, expected=lambda: asked.append(1) or case.expected())
    monkeypatch.setattr(measure, "cases_of", lambda _: Harness(counting, case))
    for schedule in SCHEDULES:
        measurer.measure(write(tmp_path, schedule), None)
    assert len(asked) == 1


def test_inputs_stay_while_searches_take_turns(measurer: Measurer) -> None:
    other = replace(TASK, timed=Sizes((128,), 2))
    first = measurer._now
    measurer.open(other)
    assert measurer._now is not first
    measurer.open(TASK)
    assert measurer._now is first
    for tokens in range(64, 64 + 64 * KEPT, 64):
        measurer.open(replace(TASK, timed=Sizes((tokens + 3,), 2)))
    measurer.open(TASK)
    assert measurer._now is not first


def test_a_winner_that_is_wrong_at_small_sizes_only_is_not_certified(
    measurer: Measurer, tmp_path: Path
) -> None:
    measurer.measure(write(tmp_path, SCHEDULES[0]), None)

    def wrong_when_small(source: str) -> str:
        return source + (
            "\n\n_launch = launch\n\n\ndef launch(*args):\n    _launch(*args)\n"
            "    if args[-1].shape[0] <= 32:\n        args[-1].mul_(1.001)\n"
        )

    wrong = write(tmp_path, SCHEDULES[1], wrong_when_small)
    assert measurer.measure(wrong, None).ms > 0
    with pytest.raises(WrongOutputError, match="relative error"):
        measurer.certify(wrong)


def test_what_breaks_a_process() -> None:
    broken = Measurer.is_broken_by
    measurer = Measurer()
    assert broken(measurer, RuntimeError("CUDA error: an illegal memory access"))
    assert broken(measurer, RuntimeError("Triton Error [CUDA]: misaligned address"))
    assert not broken(measurer, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not broken(measurer, WrongOutputError("o differs"))
