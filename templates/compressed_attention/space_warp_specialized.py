"""Schedules of compressed attention on Hopper."""

from nsagen.codegen.space import PowerOfTwo
from nsagen.codegen.spaces import warp_specialized_gradients
from nsagen.codegen.spaces.warp_specialized import space

SPACES = (
    space("compressed_attention", block_n=128, preferred=True),
    warp_specialized_gradients.space(
        "compressed_attention",
        (PowerOfTwo("programs", 512, 8192, "dk, dv: even work against parts to add up"),),
        {"block_n": 64, "num_stages": 3, "row_step": 64, "row_stages": 4, "programs": 2048},
        least_group=16,
    ),
)
