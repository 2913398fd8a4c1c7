"""Schedules of Native Sparse Attention's decode pass: selected and sliding branches, and gates."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import PowerOfTwo, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.spaces.padding import padded_heads
from nsagen.core.workload import Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and the steps that each branch takes."""
    block_pad = next_power_of_2(workload.block_size)
    selected_tiles = -(-workload.topk * block_pad // schedule.block_n)
    group_pad, head_tiles = split_kv.heads_of_program(workload)
    return {
        **padded_heads(workload),
        "group_pad": group_pad,
        "head_tiles": head_tiles,
        "block_pad": block_pad,
        "topk_pad": next_power_of_2(-(-selected_tiles * schedule.block_n // block_pad)),
        "selected_tiles": selected_tiles,
        "window_tiles": -(-workload.window_size // schedule.block_n),
    }


SPACES = (
    ScheduleSpace(
        op="native_sparse_attention",
        pass_="decode",
        algorithm="split_kv",
        knobs=(
            PowerOfTwo("block_n", 16, 256, "latency hidden against registers"),
            *split_kv.KNOBS,
        ),
        rules=(split_kv.CACHE_DTYPE,),
        derive=derive,
        shared_memory=split_kv.shared_memory,
        default=split_kv.default,
    ),
)
