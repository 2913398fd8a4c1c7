"""Schedules of sliding-window attention's forward pass on Hopper."""

from nsagen.codegen.warp_specialized import space

SPACES = (space("sliding_window_attention", block_n=64),)
