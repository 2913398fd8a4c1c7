"""Measures on a GPU: checks outputs first, then takes medians with a cold L2 and warm clocks.

Runs in a worker process (see `nsagen.core.worker`), which holds one task's inputs at a time.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nsagen.cases.base import THRESHOLDS, Case, Sizes, cases_of, relative_error
from nsagen.cases.sizes import sizes_for
from nsagen.core.compiler import compiler_name
from nsagen.core.importing import import_file
from nsagen.core.installed import driver_version
from nsagen.runtime.device import device_slug, target_of
from nsagen.tune.outcome import Timing, WrongOutputError
from nsagen.tune.task import Task

FLUSH_BYTES = 256 << 20
"""Written between timed runs: several times the largest L2 cache."""

KEPT = 24
"""Tasks whose inputs stay in memory while there is room, because searches take turns."""

RUN_MS = 20.0
"""GPU time to spend on timing one schedule, flushes not counted."""

ROUND_MS = 4.0
"""GPU time to spend on a finalist in one round, flushes not counted."""

HOPELESS = 2.0
"""A schedule that takes this many times the best one's time is timed no further."""

CYCLES_A_SECOND = 2.0e9
"""An upper bound of the clock that counts a wait on the device."""

MOST_WAIT_S = 0.02

LEAST_RUNS, MOST_RUNS = 6, 40

NEAR_TIES = 1e-3
"""Share of an index output that rounding may decide differently, where scores nearly tie."""

_BROKEN = ("CUDA error", "illegal", "misaligned", "unspecified launch failure", "device-side")


@dataclass
class _Inputs:
    """A case, and what its outputs held before any kernel wrote to them."""

    case: Case
    before: dict[str, torch.Tensor]

    @classmethod
    def of(cls, case: Case) -> _Inputs:
        return cls(case, {name: out.clone() for name, out in case.outputs.items()})

    def run(self, module: ModuleType) -> dict[str, torch.Tensor]:
        """Launch once on poisoned outputs; a kernel that does not write cannot pass for another."""
        for name, out in self.case.outputs.items():
            out.copy_(self.before[name])
        module.launch(*self.case.args)
        return self.case.outputs


@dataclass
class _Opened:
    """A task's inputs and its expected outputs; made when first needed.

    Attributes:
        trusted: outputs at the timed sizes, of a schedule that met the reference at the small ones.
        modules: loaded kernel files, and with them their binaries on the device.
    """

    task: Task
    device: str
    trusted: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[Path, ModuleType] = field(default_factory=dict)

    def load(self, path: Path) -> ModuleType:
        """A schedule's kernel file, loaded once."""
        if path not in self.modules:
            self.modules[path] = import_file(path)
        return self.modules[path]

    @cached_property
    def timed(self) -> _Inputs:
        return self._inputs(self.task.timed, 0)

    @cached_property
    def checked(self) -> tuple[_Inputs, dict[str, torch.Tensor]]:
        """Small inputs and the reference's outputs for them: computed once a task."""
        small = self._inputs(self.task.checked, 0)
        return small, small.case.expected()

    @cached_property
    def ragged(self) -> _Inputs:
        return self._inputs(sizes_for(self.task.workload, self.task.timed.topk), 1)

    def _inputs(self, sizes: Sizes, seed: int) -> _Inputs:
        workload = self.task.workload
        return _Inputs.of(cases_of(workload).make_case(workload, sizes, self.device, seed))


class GpuMeasurer:
    """Times and checks kernels of one task at a time on the current GPU."""

    device = "cuda"

    def __init__(self) -> None:
        self._kept: dict[Task, _Opened] = {}
        self._now: _Opened | None = None
        self._launch_s = 5e-4  # duration of the last launches on the host
        if self.device == "cpu" or torch.cuda.is_available():
            self._take_device()

    def _take_device(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        self._matrix = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)

    def is_broken_by(self, error: Exception) -> bool:
        """CUDA reports an illegal access at every later call, so the process must end."""
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return False
        return any(word in str(error) for word in _BROKEN)

    def identify(self) -> dict[str, str]:
        """What a record says of the device and its software; nothing where PyTorch sees no GPU."""
        if not torch.cuda.is_available():
            return {}
        return {
            "device": device_slug(),
            "name": torch.cuda.get_device_name(),
            "target": target_of(torch.device("cuda")),
            "driver": driver_version() or "unknown",
            "triton": compiler_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def open(self, task: Task) -> None:
        """Switch to a task: make its inputs, unless they are still there."""
        opened = self._kept.pop(task, None) or _Opened(task, self.device)
        self._kept[task] = opened  # the last one used comes last
        while len(self._kept) > 1 and self._is_full():
            del self._kept[next(iter(self._kept))]
        try:
            opened.timed  # noqa: B018  # makes it
        except torch.cuda.OutOfMemoryError:
            if len(self._kept) == 1:
                raise
            self._kept = {task: opened}
            torch.cuda.empty_cache()
            opened.timed  # noqa: B018
        self._now = opened

    def _is_full(self) -> bool:
        """Whether inputs of other tasks must be freed before more are made."""
        if self.device == "cpu":
            return len(self._kept) > KEPT
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return len(self._kept) > KEPT or free < total / 2

    def measure(self, path: Path, best_ms: float | None) -> Timing:
        """Check and time one schedule.

        The first correct one is compared with the reference at small sizes; all others must agree
        with its outputs at the timed sizes. `certify` compares a winner with the reference.

        Args:
            best_ms: the fastest so far; a much slower one is timed roughly.

        Raises:
            WrongOutputError: an output differs from the reference or from other schedules'.
        """
        assert self._now is not None
        task, module = self._now, self._now.load(path)
        if task.trusted:
            error = _compare(task.timed.run(module), task.trusted)
        else:
            small, expected = task.checked
            error = _compare(small.run(module), expected)
            outputs = task.timed.run(module)
            task.trusted = {name: out.clone() for name, out in outputs.items()}
        args = task.timed.case.args
        return self._time(lambda: module.launch(*args), best_ms, error)

    def certify(self, path: Path) -> float:
        """Compare a winner with the reference at even and ragged sizes; returns its largest error.

        Raises:
            WrongOutputError: an output differs from the reference.
        """
        assert self._now is not None
        module = self._now.load(path)
        small, expected = self._now.checked
        error = _compare(small.run(module), expected)
        ragged = self._now.ragged
        return max(error, _compare(ragged.run(module), ragged.case.expected()))

    def compare(self, paths: Sequence[Path], rounds: int) -> list[list[float]]:
        """Medians of several schedules timed in turn: one list a schedule, one value a round.

        The order rotates, so clock drift and heat from neighbours affect all alike. A
        schedule whose outputs differ from the first one's gets an empty list.
        """
        assert self._now is not None
        inputs = self._now.timed
        args = inputs.case.args
        modules = [self._now.load(path) for path in paths]
        first = {name: out.clone() for name, out in inputs.run(modules[0]).items()}
        times: list[list[float]] = [[] for _ in modules]
        alike = [place for place, module in enumerate(modules) if self._agrees(module, first)]
        self._warm(10)
        for turn in range(rounds):
            for place in range(len(alike)):
                chosen = alike[(place + turn) % len(alike)]
                launch = modules[chosen].launch
                launch(*args)
                runs = round(ROUND_MS / times[chosen][0]) if times[chosen] else 3
                samples = self._samples(lambda launch=launch: launch(*args), min(8, max(2, runs)))
                times[chosen].append(statistics.median(samples))
        return times

    def _agrees(self, module: ModuleType, wanted: dict[str, torch.Tensor]) -> bool:
        assert self._now is not None
        try:
            _compare(self._now.timed.run(module), wanted)
        except WrongOutputError:
            return False
        return True

    def _time(self, call: Callable[[], Any], best_ms: float | None, error: float) -> Timing:
        self._warm(4)
        rough = self._samples(call, 3)
        middle = statistics.median(rough)
        if best_ms is not None and middle > HOPELESS * best_ms:
            return Timing.of(rough, error)
        runs = min(MOST_RUNS, max(LEAST_RUNS, round(RUN_MS / max(middle, 1e-3))))
        return Timing.of(self._samples(call, runs), error)

    def _samples(self, call: Callable[[], Any], runs: int) -> list[float]:
        """Milliseconds of each of several runs, each with a cold L2 cache."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        # The device waits until all launches are queued; otherwise it would wait between them.
        before = time.perf_counter()
        torch.cuda._sleep(round(min(MOST_WAIT_S, runs * self._launch_s) * CYCLES_A_SECOND))
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        self._launch_s = 1.5 * (time.perf_counter() - before) / runs
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _warm(self, products: int) -> None:
        """Work hard for some milliseconds, so that clocks are up when timing starts."""
        for _ in range(products):
            torch.mm(self._matrix, self._matrix)


def _compare(outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of the outputs.

    Raises:
        WrongOutputError: one is above its dtype's threshold, or indices differ in more places
            than near ties explain.
    """
    worst = 0.0
    for name, wanted in expected.items():
        out = outputs[name]
        if not out.dtype.is_floating_point:
            differ = int((out != wanted.to(out.device)).sum())
            if differ > NEAR_TIES * out.numel():
                raise WrongOutputError(f"{name} differs in {differ} of {out.numel()} places")
            continue
        error, threshold = relative_error(out, wanted), THRESHOLDS[out.dtype]
        if not error <= threshold:
            raise WrongOutputError(f"{name}: relative error {error:.1e} (limit {threshold:.0e})")
        worst = max(worst, error)
    return worst
