"""The schedule spaces of selected attention's backward pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.sizes import LEAST_TILE, element_bytes, padded_heads
from nsagen.codegen.space import Choice, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload


def tiles_block(workload: Workload, schedule: Schedule, target: Target) -> bool:
    """Steps cover a block exactly, or one step covers it with the fewest masked keys."""
    block_n = int(schedule.block_n)
    return int(workload.block_size) % block_n == 0 or block_n == block_b(workload)


def holds_group(workload: Workload, schedule: Schedule, target: Target) -> bool:
    """A step of the key blocks' pass takes at least one token's whole group."""
    return int(schedule.block_m) >= int(workload.gqa_ratio)


def block_b(workload: Workload) -> int:
    """block_size padded to a tile's side."""
    return max(LEAST_TILE, next_power_of_2(int(workload.block_size)))


def derive_keys(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes of the key blocks' pass."""
    group, block_m = int(workload.gqa_ratio), int(schedule.block_m)
    return {
        **padded_heads(workload),
        "block_b": block_b(workload),
        "pad_b": block_b(workload) != int(workload.block_size),
        "tile_tokens": block_m // group,
        "pad_m": block_m % group != 0,
    }


def derive_two_pass(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes of both passes, and which axis of the first one's scores is which."""
    group = int(workload.gqa_ratio)
    block_g = max(LEAST_TILE, next_power_of_2(group))
    rows = schedule.orientation == "rows"
    return {
        **derive_keys(workload, schedule),
        "dq_partials": False,
        "block_g": block_g,
        "pad_g": block_g != group,
        "steps_per_block": -(-int(workload.block_size) // int(schedule.block_n)),
        "by_key": "[None, :]" if rows else "[:, None]",
        "by_head": "[:, None]" if rows else "[None, :]",
        "acc_shape": "[BLOCK_G, BLOCK_D]" if rows else "[BLOCK_D, BLOCK_G]",
    }


def key_pass_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a block's keys and values, of the queries on their way, and of ds."""
    sizes = derive_keys(workload, schedule)
    both = sizes["block_d"] + sizes["block_dv"]
    block_m, stages = int(schedule.block_m), int(schedule.key_stages)
    elements = sizes["block_b"] * (both + block_m) + max(1, stages - 1) * block_m * both
    return element_bytes(workload) * elements


def two_pass_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes that the hungrier of the two passes needs."""
    sizes = derive_two_pass(workload, schedule)
    both = sizes["block_d"] + sizes["block_dv"]
    buffers = max(1, int(schedule.num_stages) - 1)
    first = element_bytes(workload) * both * (buffers * int(schedule.block_n) + sizes["block_g"])
    return max(first, key_pass_memory(workload, schedule))


def least_block_m(workload: Workload, wanted: int) -> int:
    """`wanted` rows a step, or as many as one token's group needs."""
    return max(wanted, next_power_of_2(int(workload.gqa_ratio)))


def default_part_tokens(workload: Workload) -> int:
    """About 16 thousand rows a part, in 1024 to 4096 tokens."""
    return min(4096, max(1024, next_power_of_2(16384 // int(workload.gqa_ratio))))


def default_two_pass(workload: Workload, target: Target) -> dict[str, Param]:
    """The forward pass's steps for dq; steps of 64 rows, for wgmma, over a block of keys."""
    width = element_bytes(workload)
    sizes = padded_heads(workload)
    keys = 32 * 1024 // (width * (sizes["block_d"] + sizes["block_dv"]))
    block_size = int(workload.block_size)
    steps = [n for n in (64, 32, 16) if n <= keys and block_size % n == 0]
    exact = workload.dtype == "float32"  # no matrix instruction is exact: plain FMA
    return {
        "orientation": "rows",
        "block_n": steps[0] if steps else block_b(workload),
        "num_warps": 4,
        "num_stages": 1 if exact else 3,
        "key_orientation": "keys",
        "block_m": least_block_m(workload, 16 if exact else 64),
        "key_warps": 8 if exact else 4,
        "key_stages": 1 if exact else 2,
        "part_tokens": default_part_tokens(workload),
    }


KEY_KNOBS = (
    Choice("key_orientation", ("keys", "queries"), "scores kept in registers against more warps"),
    PowerOfTwo("block_m", 16, 512, "rows a step: reuse of the block's keys against registers"),
    Choice("key_warps", (4, 8), "threads for the same key block"),
    Choice("key_stages", (1, 2, 3), "steps of queries that are loading, against shared memory"),
    PowerOfTwo("part_tokens", 16, 8192, "balance of long lists against sums of their parts"),
)

SPACES = (
    ScheduleSpace(
        op="selected_attention",
        pass_="backward",
        algorithm="two_pass",
        knobs=(
            Choice("orientation", ("rows", "columns"), "mma.sync on few rows against wgmma"),
            PowerOfTwo("block_n", 16, 256, "keys a step: fewer steps against programs at a time"),
            Choice("num_warps", (1, 2, 4, 8), "threads for the same tile"),
            Choice("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
            *KEY_KNOBS,
        ),
        rules=(
            Rule("steps of block_n tile block_size", tiles_block),
            Rule("block_m holds a group of query heads", holds_group),
        ),
        derive=derive_two_pass,
        shared_memory=two_pass_memory,
        default=default_two_pass,
    ),
)
