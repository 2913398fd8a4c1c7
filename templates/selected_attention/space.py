"""The schedule spaces of selected attention's forward pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Choice, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload

LEAST_TILE = 16
"""The least side of a tile that tl.dot multiplies."""


def tiles_block(workload: Workload, schedule: Schedule, target: Target) -> bool:
    """Steps cover a block exactly, or one step covers it with the fewest masked keys."""
    block_size, block_n = int(workload.block_size), int(schedule.block_n)
    return block_size % block_n == 0 or block_n == whole_block(workload)


def whole_block(workload: Workload) -> int:
    """The least block_n that covers a block in one step."""
    return max(LEAST_TILE, next_power_of_2(int(workload.block_size)))


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, and which axis of the scores is which."""
    group, block_n = int(workload.gqa_ratio), int(schedule.block_n)
    block_g = max(LEAST_TILE, next_power_of_2(group))
    rows = schedule.orientation == "rows"
    return {
        **padded(workload),
        "block_g": block_g,
        "pad_g": block_g != group,
        "steps_per_block": -(-int(workload.block_size) // block_n),
        "key_axis": 1 if rows else 0,
        "by_key": "[None, :]" if rows else "[:, None]",
        "by_head": "[:, None]" if rows else "[None, :]",
        "score_shape": "[BLOCK_G, BLOCK_N]" if rows else "[BLOCK_N, BLOCK_G]",
        "acc_shape": "[BLOCK_G, BLOCK_DV]" if rows else "[BLOCK_DV, BLOCK_G]",
    }


def padded(workload: Workload) -> dict[str, Any]:
    """Head sizes padded to powers of two, and how exact tl.dot has to be."""
    dim, v_dim = int(workload.head_dim), int(workload.v_head_dim)
    block_d, block_dv = next_power_of_2(dim), next_power_of_2(v_dim)
    return {
        "block_d": block_d,
        "block_dv": block_dv,
        "pad_d": block_d != dim,
        "pad_dv": block_dv != v_dim,
        "dot_precision": ', input_precision="ieee"' if workload.dtype == "float32" else "",
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the key and value tiles that are on their way, and of the query tile.

    A step's own tiles are read at once by mma.sync, so one buffer less than num_stages does.
    """
    width = 4 if workload.dtype == "float32" else 2
    sizes = derive(workload, schedule)
    step = int(schedule.block_n) * (sizes["block_d"] + sizes["block_dv"])
    buffers = max(1, int(schedule.num_stages) - 1)
    return width * (buffers * step + sizes["block_g"] * sizes["block_d"])


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Steps of up to 32 KiB, two of them on their way."""
    width = 4 if workload.dtype == "float32" else 2
    sizes = padded(workload)
    keys = 32 * 1024 // (width * (sizes["block_d"] + sizes["block_dv"]))
    block_size = int(workload.block_size)
    steps = [n for n in (128, 64, 32, 16) if n <= keys and block_size % n == 0]
    block_n = min(steps[0], 64) if steps else whole_block(workload)
    if workload.dtype == "float32":  # no matrix instruction is exact: plain FMA
        return {"orientation": "rows", "block_n": block_n, "num_warps": 4, "num_stages": 1}
    warps = min(4, block_n // 8)
    return {"orientation": "rows", "block_n": block_n, "num_warps": warps, "num_stages": 3}


SPACES = (
    ScheduleSpace(
        op="selected_attention",
        pass_="forward",
        algorithm="query_major",
        knobs=(
            Choice("orientation", ("rows", "columns"), "mma.sync on few rows against wgmma"),
            PowerOfTwo("block_n", 16, 256, "keys a step: fewer steps against programs at a time"),
            Choice("num_warps", (1, 2, 4, 8), "threads for the same tile"),
            Choice("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
        ),
        rules=(Rule("steps of block_n tile block_size", tiles_block),),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    ),
)
