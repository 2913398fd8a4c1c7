"""Schedules of compressed attention's forward pass on Hopper."""

from nsagen.codegen.warp_specialized import space

SPACES = (space("compressed_attention", block_n=128, preferred=True),)
