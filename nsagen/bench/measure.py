"""Times and ceilings of the current GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import triton.testing

from nsagen.cases.base import Cost
from nsagen.core.errors import UnsupportedWorkloadError

WARMUP_MS, REPEAT_MS = 25, 150
"""For how long a call is repeated, unmeasured and then measured."""


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reached in the same run.

    Attributes:
        flops: operations/s of a bfloat16 matrix product of 8192 x 8192 x 8192.
        bytes: bytes/s of a large copy, read and written.
    """

    flops: float
    bytes: float

    def floor_ms(self, cost: Cost) -> float:
        """The least time that work can take: its operations or its bytes, whichever is longer."""
        return 1e3 * max(cost.flops / self.flops, cost.bytes / self.bytes)


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call between two CUDA events, the L2 cache cleared before each."""
    return cast(
        float, triton.testing.do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median")
    )


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replayed CUDA graph, free of the host's time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads kernels, which a capture may not
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_milliseconds(call: Callable[[], object], calls: int = 200) -> float:
    """Mean time of a call on the host, for few enough calls that no queue of a GPU fills."""
    for _ in range(calls // 10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * elapsed / calls


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
