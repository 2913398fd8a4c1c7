"""Times and memory of a rank's device for benchmarks/distributed.py; the end of runs that hang."""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

Row = dict[str, Any]
Spans = list[tuple[float, float]]

LONG_MS = 2000
"""A call that takes longer is measured once."""


@dataclass
class Meter:
    """Times and memory of this rank's device, and how much time is left, in all and for a row."""

    device: torch.device
    calls: int
    seconds: float = math.inf
    row_seconds: float = math.inf
    began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def is_over(self) -> bool:
        """Whether the time is up, by the first rank's clock."""
        over = torch.tensor([self.elapsed > self.seconds], dtype=torch.int32, device=self.device)
        dist.broadcast(over, 0)
        return bool(over)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median time of some calls that all ranks begin together, on the slowest rank."""
        call()  # loads kernels, and finds its place in memory
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        once = self._largest(self._time(call))
        if once > LONG_MS or self.calls == 1:
            return once
        count = min(self.calls, max(3, int(1000 / once)))
        return self._largest(statistics.median(self._time(call) for _ in range(count)))

    def host_milliseconds(self, call: Callable[[], object]) -> float:
        """How long the slowest rank's host takes to start a call's work, which is no less than the
        call takes where the host is what it waits for."""
        found = []
        for _ in range(3):
            dist.barrier()
            self.wait()
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        self.wait()
        return self._largest(statistics.median(found))

    def peak_bytes(self) -> int | None:
        """The most memory that a call took since `milliseconds` began; None on a CPU, which does
        not count it."""
        if self.device.type != "cuda":
            return None
        return int(self._largest(torch.cuda.max_memory_allocated(self.device)))

    def moving(self, call: Callable[[], object]) -> Row:
        """Milliseconds in which NCCL's kernels run during a call, waits for the other ranks among
        them; and those of them in which no other kernel runs."""
        if self.device.type != "cuda":
            call()
            return {}
        dist.barrier()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.wait()
        spans: list[Spans] = [[], []]
        for event in profiler.events() or ():
            if "CUDA" in str(event.device_type):
                span = event.time_range  # in microseconds
                spans["nccl" in event.name.lower()].append((span.start, span.end))
        others, exchanges = spans
        alone = covered([*others, *exchanges]) - covered(others)
        return {"nccl_ms": 1e-3 * covered(exchanges), "nccl_alone_ms": 1e-3 * alone}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _time(self, call: Callable[[], object]) -> float:
        dist.barrier()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def _largest(self, value: float) -> float:
        over = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(over, dist.ReduceOp.MAX)
        return float(over)


def covered(spans: Spans) -> float:
    """The length of the union of some (start, end)."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@contextmanager
def watched(seconds: float, rows: list[Row], keep: Callable[[list[Row]], object]) -> Iterator[None]:
    """End this process if the last row is not done in time: a rank that waits for another's
    exchange waits forever."""

    def end() -> None:
        rows[-1]["error"] = f"no end within {seconds:.0f} s"
        keep(rows)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if seconds < math.inf:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
