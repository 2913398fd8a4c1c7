"""Schedules of sliding-window attention's forward pass on Hopper."""

from nsagen.codegen.warp_specialized import space

# On an H200 (16 heads of 128 a group, 65536 tokens) 2.54 ms; plain row_tiles at its best 2.95.
SPACES = (space("sliding_window_attention", block_n=64, preferred=True),)
