"""The schedule spaces of selected attention's forward pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import (
    LEAST_TILE,
    element_bytes,
    few_bytes,
    group_tile,
    multiplies_from_shared_memory,
    padded_heads,
    plain_keys,
    raw_peak,
)
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def within_block(workload: Workload, schedule: Schedule, target: Target) -> bool:
    """A step is no longer than a block takes."""
    return int(schedule.block_n) <= whole_block(workload)


def whole_block(workload: Workload) -> int:
    """The smallest block_n that covers a block in one step."""
    return max(LEAST_TILE, next_power_of_2(int(workload.block_size)))


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, and which axis of the scores is which."""
    group, block_n = int(workload.gqa_ratio), int(schedule.block_n)
    block_g, group_tiles = group_tile(workload)
    rows = schedule.orientation == "rows"
    return {
        **padded_heads(workload),
        "raw_peak": raw_peak(workload),
        "block_g": block_g,
        "group_tiles": group_tiles,
        "pad_g": block_g * group_tiles != group,
        "steps_per_block": -(-int(workload.block_size) // block_n),
        "key_axis": 1 if rows else 0,
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the key and value tiles in flight, and of the query tile.

    mma.sync reads a step's own tiles at once, so one buffer fewer than num_stages is enough.
    float32's probabilities go through shared memory on their way to the second product.
    """
    width = element_bytes(workload)
    sizes = derive(workload, schedule)
    step = int(schedule.block_n) * (sizes["block_d"] + sizes["block_dv"])
    buffers = max(1, int(schedule.num_stages) - 1)
    turned = sizes["block_g"] * int(schedule.block_n) if width == 4 else 0
    return width * (buffers * step + sizes["block_g"] * sizes["block_d"] + turned) + 256


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Small programs, so that many run at a time: steps of 8 KiB, 64 results per thread.

    Of the schedules timed on an H200 (16 heads of 128 a group, 32768 tokens) these were the
    fastest: 6.5 ms, where steps of 32 KiB in two warps took 9.3.
    """
    exact = workload.dtype == "float32"  # no matrix instruction is exact: plain FMA
    sizes = padded_heads(workload)
    bytes_a_key = element_bytes(workload) * (sizes["block_d"] + sizes["block_dv"])
    keys = max(LEAST_TILE, (32 if exact else 8) * 1024 // bytes_a_key)
    rows, _ = group_tile(workload)
    if exact:
        keys = plain_keys(rows, keys, max(sizes["block_d"], sizes["block_dv"]))
    block_size = int(workload.block_size)
    steps = [n for n in (64, 32, 16) if n <= min(keys, whole_block(workload))]
    block_n = next((n for n in steps if block_size % n == 0), steps[0])
    if exact:
        # With 4 warps, or one stage, operands of plain products go through the stack.
        return {"orientation": "rows", "block_n": block_n, "num_warps": 8, "num_stages": 2}
    warps = min(8, max(1, rows * max(sizes["block_d"], sizes["block_dv"]) // 2048))
    return {"orientation": "rows", "block_n": block_n, "num_warps": warps, "num_stages": 3}


SMALL_GROUP = 8
"""Query heads of the smallest group that reads its blocks query-major."""


def prefers_key_major(workload: Workload, target: Target) -> bool:
    """Small groups, whose partial results cost less than the blocks each token would read.

    Not measured: a token writes and reads topk G Dv elements, or reads topk B (D + Dv) from L2.
    A whole block must fit the target's shared memory, and its scores the registers: 64 a thread
    for 128 keys. float32 has no exact matrix instruction, and plain products of a block spill.
    """
    if workload.dtype == "float32":
        return False
    schedule = Schedule.of("key_major", default_key_major(workload, target))
    fits = key_major_memory(workload, schedule) <= target.shared_memory
    return int(workload.gqa_ratio) < SMALL_GROUP and fits and whole_block(workload) <= 128


def whole_lists(workload: Workload) -> bool:
    """Algorithms that don't start from what forced blocks gave."""
    return not workload.local_blocks


def prefers_query_major(workload: Workload, target: Target) -> bool:
    """Not from the forced blocks of small groups: those are faster key-major, over whole lists."""
    return whole_lists(workload) or int(workload.gqa_ratio) >= SMALL_GROUP


def holds_group(workload: Workload, schedule: Schedule, target: Target) -> bool:
    """A step takes at least one token's whole group."""
    return int(schedule.block_m) >= int(workload.gqa_ratio)


def derive_key_major(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes of a step: a block of keys, and whole groups of query heads."""
    group, block_m = int(workload.gqa_ratio), int(schedule.block_m)
    return {
        **padded_heads(workload),
        "raw_peak": raw_peak(workload),
        "block_b": whole_block(workload),
        "pad_b": whole_block(workload) != int(workload.block_size),
        "tile_tokens": block_m // group,
        "pad_m": block_m % group != 0,
    }


def key_major_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a block's keys and values, and of the queries in use and in flight."""
    sizes = derive_key_major(workload, schedule)
    keys = sizes["block_b"] * (sizes["block_d"] + sizes["block_dv"])
    buffers = min(2, int(schedule.num_stages))
    return element_bytes(workload) * (keys + buffers * int(schedule.block_m) * sizes["block_d"])


def key_major_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of the probabilities, in float32, where a product takes them from shared memory."""
    scores = 4 * int(schedule.block_m) * whole_block(workload)
    return few_bytes(workload, schedule, target) + (
        scores if multiplies_from_shared_memory(target) else 0
    )


def default_key_major(workload: Workload, target: Target) -> dict[str, Param]:
    """Steps of 64 rows, for wgmma; parts of about 512 rows; wide heads take more warps."""
    group = int(workload.gqa_ratio)
    sizes = padded_heads(workload)
    exact = workload.dtype == "float32"  # no matrix instruction is exact: plain FMA
    wide = max(sizes["block_d"], sizes["block_dv"]) > 128  # 64 rows spill in eight warps
    most = (
        2 if target.arch == "100" and whole_block(workload) == LEAST_TILE else 3
    )  # a third spills
    for block_m, stages in ((32 if exact or wide else 64, 1 if exact else most), (16, 1)):
        knobs: dict[str, Param] = {
            "block_m": max(block_m, next_power_of_2(group)),
            "num_warps": 8 if wide else 4,
            "num_stages": stages,
            "part_tokens": max(128, next_power_of_2(512 // group)),
        }
        if key_major_memory(workload, Schedule.of("key_major", knobs)) <= target.shared_memory:
            break
    return knobs


STEP_KNOBS = (
    PowerOfTwo("block_n", 16, 256, "keys a step: fewer steps against programs at a time"),
    Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
    Knob("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
)
"""For steps over a token's own blocks."""

SPACES = (
    ScheduleSpace(
        op="selected_attention",
        pass_="forward",
        algorithm="key_major",
        knobs=(
            PowerOfTwo("block_m", 16, 512, "rows a step: reuse of the block against registers"),
            Knob("num_warps", (4, 8), "threads for the same tile"),
            Knob("num_stages", (1, 2, 3), "steps of queries that are loading"),
            PowerOfTwo("part_tokens", 16, 8192, "balance of long lists against reads of blocks"),
        ),
        rules=(Rule("block_m holds a group of query heads", holds_group),),
        derive=derive_key_major,
        shared_memory=key_major_memory,
        scratch=key_major_scratch,
        default=default_key_major,
        preferred=prefers_key_major,
        supports=whole_lists,
    ),
    ScheduleSpace(
        op="selected_attention",
        pass_="forward",
        algorithm="query_major",
        knobs=(
            Knob(
                "orientation",
                ("rows", "columns"),
                '"rows" suit mma.sync, "columns" wgmma',
            ),
            *STEP_KNOBS,
        ),
        rules=(Rule("block_n is a block's padded size or less", within_block),),
        derive=derive,
        shared_memory=shared_memory,
        scratch=few_bytes,
        default=default,
        preferred=prefers_query_major,
    ),
)
