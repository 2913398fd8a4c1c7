"""Times and ceilings of the current GPU."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton.testing
from torch.profiler import ProfilerActivity, profile

from nsagen.cases.base import Cost
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.paths import prepare_compiler_cache

WARMUP_MS, REPEAT_MS = 25, 150
"""How long a call is repeated, first unmeasured, then measured."""


@dataclass(frozen=True)
class Ceilings:
    """Rates that the GPU reached in the same run.

    Attributes:
        flops: operations/s of a bfloat16 matrix product of 8192 x 8192 x 8192.
        bytes: bytes/s of a large copy, read and written.
    """

    flops: float
    bytes: float

    def floor_ms(self, cost: Cost) -> float:
        """The least time for the work: its operations or its bytes, whichever takes longer."""
        return 1e3 * max(cost.flops / self.flops, cost.bytes / self.bytes)


LONG_MS = 100
"""A call that takes longer is repeated three times: the host's clock and a warm L2 cache change
nothing then."""


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call between two CUDA events, the L2 cache cleared before each; of a call
    beyond `LONG_MS`, of three calls."""
    if _waited_ms(call) > LONG_MS:  # with what the first call compiles
        times = [_waited_ms(call) for _ in range(3)]
        if min(times) > LONG_MS:
            return statistics.median(times)
    return cast(
        float, triton.testing.do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median")
    )


def _waited_ms(call: Callable[[], object]) -> float:
    """How long the host waits for one call's end."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replayed CUDA graph, without the host's time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads kernels, which is forbidden in a capture
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # PyTorch's own stream may be another GPU's
        call()
    return graph.replay


def host_milliseconds(call: Callable[[], object], calls: int = 200) -> float:
    """Mean time of a call on the host, for few enough calls that no GPU queue fills."""
    for _ in range(calls // 10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * elapsed / calls


@dataclass(frozen=True)
class HostCost:
    """What one eager call costs on the host.

    Attributes:
        ms: how long the call takes to return while the GPU's queue is not full.
        launches: kernels, copies and fills that it starts.
    """

    ms: float
    launches: int

    def columns(self, gpu_ms: float) -> dict[str, Any]:
        """A row's cells: `host_ms`, `launches`, and as `bound` whether the host limits a call that
        needs `gpu_ms`."""
        bound = "host" if self.ms > gpu_ms else ""
        return {"host_ms": self.ms, "launches": self.launches, "bound": bound}


_QUEUE = 500
"""Launches that surely fit in the GPU's queue before the host has to wait."""

_ROUND_MS, _COST_MS = 50, 300
"""GPU time that the calls of one round start, and those of all rounds; or one call."""

HOST_COLUMNS = {"host_ms": ".3f", "launches": "", "bound": ""}


def host_cost(call: Callable[[], object], gpu_ms: float) -> HostCost:
    """Measure what a call costs on the host; it has been called a few times before, and takes the
    GPU `gpu_ms`."""
    launches = sum(launched(call).values())
    calls = max(1, min(50, _QUEUE // max(1, launches), int(_ROUND_MS / gpu_ms)))
    times = []
    for _ in range(max(1, min(max(3, 100 // calls), int(_COST_MS / (calls * gpu_ms))))):
        torch.cuda.synchronize()
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return HostCost(1e3 * statistics.median(times), launches)


def launched(call: Callable[[], object]) -> dict[str, int]:
    """Kernels, copies and fills that a call starts on the GPU, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = (e for e in profiler.events() or () if "CUDA" in str(e.device_type))
    return Counter(event.name for event in events)


def measure_ceilings() -> Ceilings:
    """Measure the GPU's matrix rate and copy rate, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3
    source = torch.empty(1 << 31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3
    return Ceilings(flops, copied)


def require_gpu(name: str) -> None:
    """Refuse to run without a GPU.

    Raises:
        UnsupportedWorkloadError: PyTorch sees none.
    """
    if not torch.cuda.is_available():
        raise UnsupportedWorkloadError(
            f"bench {name}: times are measured on a GPU; PyTorch sees none here; run it where one "
            "is, or look at benchmarks/results"
        )
    prepare_compiler_cache(f"bench {name}", will_write=False)
