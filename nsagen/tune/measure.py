"""Measuring on a GPU: checked outputs first, then medians with a cold L2 and warm clocks.

Runs in a worker process (see `nsagen.tune.worker`), which holds one task's inputs at a time.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from nsagen.codegen.compile import load_module
from nsagen.harness.base import THRESHOLDS, Case, harness_of, relative_error
from nsagen.runtime.device import device_slug, target_of
from nsagen.tune.task import Task
from nsagen.tune.timing import Timing, WrongOutputError
from nsagen.verify import sizes_for

FLUSH_BYTES = 256 << 20
"""Written between timed runs: several times the largest L2 cache."""

RUN_MS = 50.0
"""GPU time to spend on timing one schedule, flushes not counted."""

ROUND_MS = 6.0
"""GPU time to spend on a finalist in one round, flushes not counted."""

HOPELESS = 2.0
"""A schedule that takes this many times the best one's time is not timed any further."""

LEAST_RUNS, MOST_RUNS = 8, 60

NEAR_TIES = 1e-3
"""The share of an index output that rounding may decide differently, where scores nearly tie."""

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


class GpuMeasurer:
    """Times and checks kernels of one task at a time on the current GPU."""

    device = "cuda"

    def __init__(self) -> None:
        self._task: Task | None = None
        self._timed: _Inputs | None = None
        self._checked: _Inputs | None = None
        self._expected: dict[str, torch.Tensor] = {}
        self._trusted: dict[str, torch.Tensor] = {}
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
        """What a record notes of the device and the software on it."""
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        except OSError:
            said = ""
        return {
            "device": device_slug(),
            "name": torch.cuda.get_device_name(),
            "target": target_of(torch.device("cuda")),
            "driver": (said.splitlines() or ["unknown"])[0].strip(),
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def open(self, task: Task) -> None:
        """Make a task's inputs, and what the reference says of the smaller ones."""
        self._task, self._trusted, self._expected = task, {}, {}
        self._timed = self._checked = None
        torch.cuda.empty_cache()
        make_case = harness_of(task.workload).make_case
        self._checked = _Inputs.of(make_case(task.workload, task.checked, self.device))
        self._expected = self._checked.case.expected()
        self._timed = _Inputs.of(make_case(task.workload, task.timed, self.device))

    def measure(self, path: Path, best_ms: float | None) -> Timing:
        """Check and time one schedule.

        Args:
            best_ms: the fastest so far; one far slower is timed roughly.

        Raises:
            WrongOutputError: an output differs from the reference or from other schedules'.
        """
        assert self._timed is not None
        assert self._checked is not None
        module = load_module(path)
        error = _compare(self._checked.run(module), self._expected)
        outputs = self._timed.run(module)
        if not self._trusted:
            self._trusted = {name: out.clone() for name, out in outputs.items()}
        error = max(error, _compare(outputs, self._trusted))
        args = self._timed.case.args
        return self._time(lambda: module.launch(*args), best_ms, error)

    def certify(self, path: Path) -> float:
        """Check a finalist at ragged sizes too; its largest relative error.

        Raises:
            WrongOutputError: an output differs from the reference.
        """
        assert self._task is not None
        workload = self._task.workload
        case = harness_of(workload).make_case(workload, sizes_for(workload), self.device, 1)
        return _compare(_Inputs.of(case).run(load_module(path)), case.expected())

    def compare(self, paths: Sequence[Path], rounds: int) -> list[list[float]]:
        """Medians of several schedules timed in turn: one list a schedule, one value a round.

        The order rotates, so that drifting clocks and a neighbour's heat fall on all alike. A
        schedule whose outputs differ from the first one's has an empty list.
        """
        assert self._timed is not None
        args = self._timed.case.args
        modules = [load_module(path) for path in paths]
        first = {name: out.clone() for name, out in self._timed.run(modules[0]).items()}
        times: list[list[float]] = [[] for _ in modules]
        alike = [place for place, module in enumerate(modules) if self._agrees(module, first)]
        self._warm(20)
        for turn in range(rounds):
            for place in range(len(alike)):
                chosen = alike[(place + turn) % len(alike)]
                launch = modules[chosen].launch
                launch(*args)
                runs = round(ROUND_MS / times[chosen][0]) if times[chosen] else 3
                samples = self._samples(lambda launch=launch: launch(*args), min(10, max(3, runs)))
                times[chosen].append(statistics.median(samples))
        return times

    def _agrees(self, module: ModuleType, wanted: dict[str, torch.Tensor]) -> bool:
        assert self._timed is not None
        try:
            _compare(self._timed.run(module), wanted)
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
        torch.cuda._sleep(1_000_000)  # about half a millisecond: launches queue up meanwhile
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _warm(self, products: int) -> None:
        """Work hard for some milliseconds, so that clocks are up when timing begins."""
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
