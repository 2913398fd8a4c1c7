"""Schedules of compressed attention's decode pass."""

from __future__ import annotations

import dataclasses
from typing import Any

from nsagen.codegen.space import Knob, next_power_of_2
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.spaces.padding import LEAST_TILE, padded_heads
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

_MASSES_A_THREAD = 32
"""Of the second kernel: a head's of a block each, loaded together."""


def _step_pad(workload: Workload) -> int:
    """Windows that start in a block, padded to a power of two."""
    return next_power_of_2(workload.block_size // workload.kernel_stride)


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and windows and blocks in units of kernel_stride."""
    step = workload.block_size // workload.kernel_stride
    width = workload.kernel_size // workload.kernel_stride
    heads_pad = next_power_of_2(workload.gqa_ratio)
    group_pad, head_tiles = split_kv.heads_of_program(workload)
    step_pad = min(_step_pad(workload), schedule.block_n)
    return {
        **padded_heads(workload),
        "in_pairs": split_kv.in_pairs(workload),
        "group_pad": group_pad,
        "head_tiles": head_tiles,
        "heads_pad": heads_pad,
        "topk_pad": next_power_of_2(workload.topk),
        "step": step,
        "step_pad": step_pad,
        "parts": -(-step // step_pad),
        "width": width,
        # The last window of a block starts at unit step - 1 and covers `width` units.
        "spill": (step + width - 2) // step,
        "summed": 32 * schedule.combine_warps * _MASSES_A_THREAD,
    }


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """About 32 KiB per step; as many in flight as leave room for two programs per processor,
    or four of two warps."""
    block_n, sizes = split_kv.default_step(workload), padded_heads(workload)
    if workload.dtype != "float32":
        windows, padded = _step_pad(workload), sizes["pad_d"] or sizes["pad_dv"]
        if windows <= 2 * block_n and not padded:
            block_n = max(block_n, windows)
        # A step is in registers: masks of padded heads, and of a block's part, leave less room.
        parts = windows > block_n and windows * workload.kernel_stride != workload.block_size
        if (padded or parts) and split_kv.tile_bytes(workload, block_n) > split_kv.STEP_BYTES // 2:
            block_n = max(LEAST_TILE, block_n // 2)
    warps = split_kv.default_warps(workload, target)
    resident = 4 if warps == 2 else 2
    step = split_kv.tile_bytes(workload, block_n)
    return {
        "block_n": block_n,
        "programs": split_kv.default_programs(target, resident),
        "num_warps": warps,
        "num_stages": split_kv.default_stages(target, step, resident, warps),
        "combine_warps": 1 if target.arch == "120" else 4,  # more spill there, for some groups
    }


def default_whole(workload: Workload, target: Target) -> dict[str, Param]:
    """As `default`, and one kernel up to 4096 tokens of the usual windows."""
    return {**default(workload, target), "whole_tiles": 4}


SPLIT_KV = split_kv.space("compressed_attention", derive, default)
WHOLE_ROWS = dataclasses.replace(
    SPLIT_KV,
    algorithm="whole_rows",
    knobs=(
        *SPLIT_KV.knobs,
        Knob("whole_tiles", (4, 8, 16), "steps that one program takes, against a second launch"),
    ),
    default=default_whole,
    supports=lambda workload: split_kv.heads_of_program(workload)[1] == 1,
    preferred=lambda workload, target: False,
)

SPACES = (SPLIT_KV, WHOLE_ROWS)
