"""The schedule space of block selection's decode pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.spaces.padding import (
    LEAST_TILE,
    element_bytes,
    few_bytes,
    multiplies_from_shared_memory,
)
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

_SCORES_AT_ONCE = 1024
"""Heads times blocks that a program of the second kernel scores."""

_PLAIN_SCORES = 64 * 32
"""Heads times windows of a plain product whose operands eight warps keep off the stack."""


def step(workload: Workload) -> int:
    """Windows that start in a block."""
    return int(workload.block_size) // int(workload.kernel_stride)


def apart(workload: Workload) -> bool:
    """Whether each query head selects for itself."""
    return workload.score_heads == "each" or workload.gqa_ratio == 1


def whole_blocks(workload: Workload) -> bool:
    """Whether the first kernel's tiles can hold blocks whose score is their largest product."""
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    if step(workload) * row > split_kv.STEP_BYTES:
        return False
    scores = heads_of_program(workload)[0] * step(workload)
    if workload.dtype == "float32" and scores > _PLAIN_SCORES:
        return False
    raw = workload.score_norm == "none" and workload.kernel_size == workload.kernel_stride
    windows = step(workload)
    return raw and apart(workload) and windows == next_power_of_2(windows) and windows <= 256


def heads_of_program(workload: Workload) -> tuple[int, int]:
    """(query heads that a program takes, padded to a tile's rows, and the programs of a group).

    All heads of a key head, unless their queries take more than 32 KiB.
    """
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    padded = max(LEAST_TILE, next_power_of_2(int(workload.gqa_ratio)))
    tile = max(LEAST_TILE, min(padded, split_kv.STEP_BYTES // row))
    return tile, -(-int(workload.gqa_ratio) // tile)


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, windows and blocks in units of kernel_stride."""
    heads = 1 if apart(workload) else int(workload.gqa_ratio)
    heads_pad = next_power_of_2(heads)
    group_pad, head_tiles = heads_of_program(workload)
    return {
        "block_d": next_power_of_2(int(workload.head_dim)),
        "pad_d": next_power_of_2(int(workload.head_dim)) != workload.head_dim,
        "group_pad": group_pad,
        "head_tiles": head_tiles,
        "heads": heads,
        "heads_pad": heads_pad,
        "step": step(workload),
        "width": int(workload.kernel_size) // int(workload.kernel_stride),
        "whole_blocks": whole_blocks(workload),
        "topk_pad": next_power_of_2(int(workload.topk)),
        "scored": max(16, _SCORES_AT_ONCE // heads_pad),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """The keys in flight (the current ones are in registers), queries and scores."""
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    (group, _), block_n = heads_of_program(workload), int(schedule.block_n)
    steps = max(1, int(schedule.num_stages) - 1)
    return row * (steps * block_n + group) + 4 * group * block_n


def scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """The current keys, where products take them from shared memory."""
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    current = row * int(schedule.block_n) if multiplies_from_shared_memory(target) else 0
    return current + few_bytes(workload, schedule, target)


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """About 16 KiB a step, and enough of them in flight to hide the memory's latency."""
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    block_n = max(16, min(64, next_power_of_2(16 * 1024 // row)))
    if whole_blocks(workload):
        block_n = max(block_n, step(workload))
    room = (target.shared_memory // 2 - 8 * 1024) // (row * block_n)
    # A narrow tile is widened in registers: four warps would use the stack for a large one.
    widened = workload.cache_dtype and row * block_n > split_kv.STEP_BYTES // 2
    return {
        "block_n": block_n,
        "programs": max(n for n in split_kv.PROGRAMS if n <= max(132, 2 * target.num_sms)),
        "num_warps": 8 if workload.dtype == "float32" or widened else 4,
        "num_stages": max(1, min(4, room)) + 1,
    }


SPACES = (
    ScheduleSpace(
        op="block_selection",
        pass_="decode",
        algorithm="split_keys",
        knobs=(
            PowerOfTwo("block_n", 16, 256, "latency hidden against registers"),
            Knob("programs", split_kv.PROGRAMS, "a full GPU against short walks"),
            Knob("num_warps", (1, 2, 4, 8), "registers a thread against programs that fit"),
            Knob("num_stages", (1, 2, 3, 4, 5), "loads in flight against shared memory"),
        ),
        rules=(
            split_kv.CACHE_DTYPE,
            Rule(
                "a step must hold the windows of a whole block, where it takes their maximum",
                lambda w, s, t: not whole_blocks(w) or int(s.block_n) >= step(w),
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        scratch=scratch,
        default=default,
    ),
)
