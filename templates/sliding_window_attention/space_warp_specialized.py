"""Schedules of sliding-window attention on Hopper."""

from nsagen.codegen.spaces import warp_specialized_gradients
from nsagen.codegen.spaces.warp_specialized import space

SPACES = (
    # On an H200 (16 heads of 128 a group, 65536 tokens) 2.54 ms; plain row_tiles at its best 2.95.
    space("sliding_window_attention", block_n=64, preferred=True),
    # Two stages of rows take the time of three and four (benchmarks/NOTES.md). Heads of 128 with
    # three keep 42 to 73 words on the stack in loops with Triton 3.6: their places take quotients.
    warp_specialized_gradients.space(
        "sliding_window_attention",
        (),
        {"block_n": 64, "num_stages": 3, "row_step": 64, "row_stages": 2},
        large_group=8,
        preferred=lambda workload, target: int(workload.gqa_ratio) >= 8,
    ),
)
