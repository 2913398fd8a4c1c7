"""Schedules of sliding-window attention on Hopper."""

from __future__ import annotations

from dataclasses import replace

from nsagen.codegen.spaces import warp_specialized_gradients
from nsagen.codegen.spaces.warp_specialized import space
from nsagen.core.target import Target
from nsagen.core.workload import Param, Workload

GRADIENTS = warp_specialized_gradients.space(
    "sliding_window_attention",
    (),
    {"block_n": 64, "num_stages": 3, "row_step": 64, "row_stages": 3},
    large_group=8,
    preferred=lambda workload, target: int(workload.gqa_ratio) >= 8,
)


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Two stages of rows for a band of whole blocks, which take the time of three and four.

    Heads of 128 with three keep 52 words on the stack in loops with Triton 3.6, whose quotients by
    three take registers. A window of tokens keeps 60, but is 1% faster in short sequences.
    """
    knobs = GRADIENTS.default(workload, target)
    return {**knobs, "row_stages": 2} if workload.block_size else knobs


SPACES = (
    # On an H200 (16 heads of 128 a group, 65536 tokens) 2.54 ms; plain row_tiles at its best 2.95.
    space("sliding_window_attention", block_n=64, preferred=True),
    replace(GRADIENTS, default=default),
)
