"""The schedule space of selected attention by the unions of neighbouring tokens' blocks."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import (
    LEAST_TILE,
    group_tile,
    padded_heads,
    raw_peak,
)
from nsagen.codegen.spaces.warp_specialized import GLUON, runs_on
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

TILE_ROWS = 64
"""Rows of a tile, tokens times padded heads: those of a warp group's product."""


def supports(workload: Workload) -> bool:
    """16-bit heads of 64, 128 or 256 whose group is 2 to 32, in blocks that steps of 32 keys fill.

    A tile has a bit for each of its tokens, so 32 at most; a single one has no neighbour.
    """
    return (
        workload.dtype != "float32"
        and {int(workload.head_dim), int(workload.v_head_dim)} <= {64, 128, 256}
        and 2 <= int(workload.gqa_ratio) <= 32
        and int(workload.block_size) % 32 == 0
    )


def apart(workload: Workload) -> dict[str, Any]:
    """query_major's default schedule, for the tokens of large unions: steps of 8 KiB."""
    sizes = padded_heads(workload)
    keys = max(LEAST_TILE, 8 * 1024 // (2 * (sizes["block_d"] + sizes["block_dv"])))
    rows, group_tiles = group_tile(workload)
    block_n = min(32, keys)
    return {
        **sizes,
        "block_n": block_n,
        "steps_per_block": int(workload.block_size) // block_n,
        "block_g": rows,
        "group_tiles": group_tiles,
        "pad_g": rows * group_tiles != int(workload.gqa_ratio),
        "key_axis": 1,
        "apart_warps": min(8, max(1, rows * max(sizes["block_d"], sizes["block_dv"]) // 2048)),
        "apart_stages": 3,
    }


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The rows of a tile, and what query_major needs."""
    group_rows = next_power_of_2(int(workload.gqa_ratio))
    return {
        **apart(workload),
        "raw_peak": raw_peak(workload),
        "group_rows": group_rows,
        "tile_tokens": TILE_ROWS // group_rows,
        "pad_group": group_rows != int(workload.gqa_ratio),
        "tile_steps": int(workload.block_size) // int(schedule.step_keys),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of both tiles' queries and rings, and 1 KiB for barriers and alignment."""
    dim, v_dim = int(workload.head_dim), int(workload.v_head_dim)
    keys = int(schedule.num_stages) * int(schedule.step_keys) * (dim + v_dim)
    return 2 * 2 * (TILE_ROWS * dim + keys) + 1024


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """A block a step where two of them fit, three in flight.

    On an H200 a block costs a tile 1.1 to 1.2 times what it costs a token with heads of 128, and
    1.5 to 2 times with heads of 64: there unions pay in short sequences only.
    """
    step_keys = min(64, int(workload.block_size) & -int(workload.block_size))
    wide = int(workload.head_dim) >= 128
    knobs = {"union_tenths": 9 if wide else 5, "choice": "tile" if wide else "call"}
    for step, stages in ((step_keys, 3), (step_keys, 2), (32, 2)):
        knobs |= {"step_keys": step, "num_stages": stages}
        if shared_memory(workload, Schedule.of("union_tiles", knobs)) <= target.shared_memory:
            break
    return knobs


def prefers_unions(workload: Workload, target: Target) -> bool:
    """Where an H200 measured it: groups of 16 heads of 128 in bfloat16.

    The free blocks of 64 tokens, and whole lists of blocks of 128 (MiniMax-M3): of query_major's
    time, learned selections take 0.6 to 0.94 and random ones 0.9 to 1.03. Heads of 64 in groups of
    8 take 0.65 in short sequences, but their gated sum has not run on a GPU; nor have lists of 96
    blocks of 64 (MiniCPM4).
    """
    forced = 0 < int(workload.local_blocks or 0) <= 2
    return (
        workload.dtype == "bfloat16"
        and int(workload.gqa_ratio) == 16
        and int(workload.head_dim) == int(workload.v_head_dim) == 128
        and int(workload.block_size) == (64 if forced else 128)
        and (forced or not workload.local_blocks)
    )


SPACES = (
    ScheduleSpace(
        op="selected_attention",
        pass_="forward",
        algorithm="union_tiles",
        knobs=(
            Knob(
                "union_tenths",
                (5, 7, 9, 11),
                "cost of a block that one token reads, in tenths of a union's: more tiles if more",
            ),
            Knob(
                "choice",
                ("call", "tile"),
                "by a call's lengths, or by each tile's lists, which cost a plan",
            ),
            PowerOfTwo("step_keys", 32, 128, "keys a step: fewer steps against registers"),
            Knob("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
        ),
        rules=(
            Rule(
                "steps of step_keys tile block_size",
                lambda w, s, t: int(w.block_size) % int(s.step_keys) == 0,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
        supports=supports,
        runs_on=runs_on,
        triton=GLUON,
        preferred=prefers_unions,
    ),
)
