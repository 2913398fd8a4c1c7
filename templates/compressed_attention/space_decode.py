"""Schedules of compressed attention's decode pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import PowerOfTwo, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.spaces.padding import padded_heads
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

_SCORES_A_THREAD = 8
"""For a head and block: few, which keeps the code short; it runs once and must be fetched."""


_MAX_COLUMNS = 256
"""Windows of a step, at most."""


def _step_pad(workload: Workload) -> int:
    """Windows that start in a block, padded to a power of two."""
    return next_power_of_2(workload.block_size // workload.kernel_stride)


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and windows and blocks in units of kernel_stride."""
    step = workload.block_size // workload.kernel_stride
    width = workload.kernel_size // workload.kernel_stride
    heads_pad = next_power_of_2(workload.gqa_ratio)
    scores_at_once = 32 * schedule.combine_warps * _SCORES_A_THREAD
    group_pad, head_tiles = split_kv.heads_of_program(workload)
    step_pad = min(_step_pad(workload), schedule.block_n)
    return {
        **padded_heads(workload),
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
        "scored": max(16, scores_at_once // heads_pad),
        "scores_at_once": scores_at_once,
    }


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """About 32 KiB per step; as many in flight as leave room for two programs per processor,
    or four of two warps."""
    block_n = split_kv.default_step(workload)
    if workload.dtype != "float32" and _step_pad(workload) <= 2 * block_n:
        block_n = max(block_n, _step_pad(workload))
    step = split_kv.tile_bytes(workload, block_n)
    two_warps = split_kv.widens_with_two_warps(workload, target)
    resident = 4 if two_warps else 2
    room = (target.shared_memory // resident - 8 * 1024) // step
    programs = max(132, resident * target.num_sms)
    return {
        "block_n": block_n,
        "programs": max(n for n in split_kv.PROGRAMS if n <= programs),
        "num_warps": 2 if two_warps else split_kv.default_warps(workload),
        "num_stages": max(1, min(2 if two_warps else 3, room)) + 1,
        "combine_warps": 1 if target.arch == "120" else 4,  # more spill there, for some groups
    }


SPACES = (
    ScheduleSpace(
        op="compressed_attention",
        pass_="decode",
        algorithm="split_kv",
        knobs=(
            PowerOfTwo("block_n", 16, _MAX_COLUMNS, "latency hidden against registers"),
            *split_kv.KNOBS,
        ),
        rules=(split_kv.CACHE_DTYPE,),
        derive=derive,
        shared_memory=split_kv.shared_memory,
        default=default,
    ),
)
