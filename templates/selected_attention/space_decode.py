"""Schedules of selected attention's decode pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import PowerOfTwo, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.spaces.padding import padded_heads
from nsagen.core.workload import Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and the steps over the selected blocks."""
    block_pad = next_power_of_2(int(workload.block_size))
    tiles = -(-int(workload.topk) * block_pad // int(schedule.block_n))
    group_pad, head_tiles = split_kv.heads_of_program(workload)
    return {
        **padded_heads(workload),
        "group_pad": group_pad,
        "head_tiles": head_tiles,
        "block_pad": block_pad,
        "topk_pad": next_power_of_2(-(-tiles * int(schedule.block_n) // block_pad)),
        "tiles": tiles,
    }


SPACES = (
    ScheduleSpace(
        op="selected_attention",
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
