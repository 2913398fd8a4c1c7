"""Schedules of sliding-window attention's forward pass on Hopper."""

from nsagen.codegen.warp_specialized import space

# With its short walks over keys it was no faster than plain row_tiles on an H200.
SPACES = (space("sliding_window_attention", block_n=64, preferred=False),)
