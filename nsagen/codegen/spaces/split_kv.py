"""What the schedule spaces of decoding share: keys and values of a row, split among programs.

The spaces are beside the templates: templates/compressed_attention/space_decode.py,
templates/native_sparse_attention/space.py and templates/selected_attention/space_decode.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import (
    LEAST_TILE,
    SCRATCH,
    element_bytes,
    group_tile,
    padded_heads,
)
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

PROGRAMS = (132, 216, 264, 324, 396, 444, 528, 1056, 2112)
"""Two and three per multiprocessor of the targets, and more."""

KNOBS = (
    Knob("programs", PROGRAMS, "a full GPU against combining"),
    Knob("num_warps", (1, 2, 4, 8), "registers a thread against programs that fit"),
    Knob("num_stages", (1, 2, 3, 4, 5), "loads in flight against shared memory"),
    Knob("combine_warps", (1, 2, 4, 8), "lanes against barriers of the second kernel"),
)

CACHE_DTYPE = Rule(
    "a cache of float8_e4m3fn needs cuda:89 or newer; int8 runs on every target",
    lambda w, s, t: t.holds(str(w.cache_dtype)),
)

WARPGROUP_ROWS = 64
"""Rows of a warpgroup product."""

STEP_BYTES = 32 * 1024
"""Most bytes of keys and values in a step of a default schedule."""


def heads_of_program(workload: Workload) -> tuple[int, int]:
    """(query heads that a program takes, padded to a tile's rows, and the programs of a group).

    All heads of a key/value head, except in float32, where wide ones would fit no small GPU.
    """
    if workload.dtype == "float32":
        return group_tile(workload)
    return max(LEAST_TILE, next_power_of_2(int(workload.gqa_ratio))), 1


def tile_bytes(workload: Workload, block_n: int) -> int:
    """Bytes of the keys and values of a step, in the dtype of the cache."""
    sizes = padded_heads(workload)
    element = 1 if workload.cache_dtype else element_bytes(workload)
    return block_n * (sizes["block_d"] + sizes["block_dv"]) * element


def in_pairs(workload: Workload) -> bool:
    """Whether a step reads two numbers of the cache at once, as an int16.

    Those of float8, which two instructions widen. A product takes 16 pairs of a key at least.
    """
    narrow = workload.cache_dtype == "float8_e4m3fn" and workload.dtype != "float32"
    return narrow and padded_heads(workload)["block_d"] >= 2 * LEAST_TILE


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """The steps in flight, queries and scores.

    The current step is in registers, unless warpgroup products take it from shared memory, where
    those of a narrow cache are widened one after the other.
    """
    group, block_n = heads_of_program(workload)[0], int(schedule.block_n)
    sizes, element = padded_heads(workload), element_bytes(workload)
    queries = group * sizes["block_d"] * element
    scores = group * block_n * 4
    in_registers = group < WARPGROUP_ROWS or bool(workload.cache_dtype)
    steps = max(1, int(schedule.num_stages) - in_registers) * tile_bytes(workload, block_n)
    if group >= WARPGROUP_ROWS and workload.cache_dtype:
        steps += block_n * max(sizes["block_d"], sizes["block_dv"]) * element
    return steps + queries + scores + SCRATCH


def default_step(workload: Workload) -> int:
    """Keys per step: as many as STEP_BYTES allows, from 16 to 64."""
    return next((n for n in (64, 32) if tile_bytes(workload, n) <= STEP_BYTES), 16)


def default_warps(workload: Workload, target: Target) -> int:
    """Four; eight in float32, whose products hold tiles in registers, and for wide outputs.

    Two for small tiles of narrow caches on cuda:90, measured for 16 heads of 128: they meet less
    often while they widen.
    """
    sizes, narrow = padded_heads(workload), bool(workload.cache_dtype)
    outputs = heads_of_program(workload)[0] * max(sizes["block_d"], sizes["block_dv"])
    if workload.dtype == "float32":
        return 8
    if narrow and target.arch == "90" and outputs <= LEAST_TILE * 128:
        return 2
    return 8 if outputs > 64 * 128 or (narrow and outputs == 64 * 128) else 4


def default_stages(target: Target, step: int, resident: int, warps: int) -> int:
    """Steps of `step` bytes in flight for which the resident programs leave room; four at most."""
    room = (target.shared_memory // resident - 8 * 1024) // step
    return max(1, min(2 if warps == 2 else 3, room)) + 1


def default_programs(target: Target, resident: int) -> int:
    """As many as run at once, `resident` of them on each multiprocessor."""
    return max(n for n in PROGRAMS if n <= max(132, resident * target.num_sms))


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """About 32 KiB per step; three programs per processor if two steps of each fit, else two.

    Splits come in multiples of a branch's steps, so programs are few and equal: as many as run at
    once, rather than half as many again.
    """
    block_n, warps = default_step(workload), default_warps(workload, target)
    step = tile_bytes(workload, block_n)
    fits = target.shared_memory // 3 >= 2 * step + 8 * 1024
    resident = 3 if fits and warps != 2 else 2
    return {
        "block_n": block_n,
        "programs": default_programs(target, resident),
        "num_warps": warps,
        "num_stages": default_stages(target, step, resident, warps),
        "combine_warps": 4,
    }


def blocks_of_steps(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and the steps over the selected blocks."""
    block_pad = next_power_of_2(int(workload.block_size))
    tiles = -(-int(workload.topk) * block_pad // int(schedule.block_n))
    group_pad, head_tiles = heads_of_program(workload)
    return {
        **padded_heads(workload),
        "in_pairs": in_pairs(workload),
        "group_pad": group_pad,
        "head_tiles": head_tiles,
        "block_pad": block_pad,
        "topk_pad": next_power_of_2(-(-tiles * int(schedule.block_n) // block_pad)),
        "tiles": tiles,
    }


def space(
    op: str,
    derive: Callable[[Workload, Schedule], dict[str, Any]],
    default: Callable[[Workload, Target], dict[str, Param]] = default,
) -> ScheduleSpace:
    """The space of an op's decode pass."""
    return ScheduleSpace(
        op=op,
        pass_="decode",
        algorithm="split_kv",
        knobs=(
            PowerOfTwo("block_n", 16, 256, "latency hidden against registers"),
            *KNOBS,
        ),
        rules=(CACHE_DTYPE,),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    )
