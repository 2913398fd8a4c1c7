"""What the schedule spaces of decoding share: keys and values of a row, split among programs.

The spaces are beside the templates: templates/compressed_attention/space_decode.py,
templates/native_sparse_attention/space.py and templates/selected_attention/space_decode.py.
"""

from __future__ import annotations

from nsagen.codegen.space import Knob, Rule, next_power_of_2
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


def default_warps(workload: Workload) -> int:
    """Four; eight in float32, whose products hold tiles in registers, and for wide outputs."""
    rows, _ = heads_of_program(workload)
    sizes = padded_heads(workload)
    outputs = rows * max(sizes["block_d"], sizes["block_dv"])
    wide = outputs > 64 * 128 or (outputs == 64 * 128 and bool(workload.cache_dtype))
    return 8 if workload.dtype == "float32" or wide else 4


def widens_with_two_warps(workload: Workload, target: Target) -> bool:
    """Whether a program of two warps is the default: they meet less often while they widen.

    Measured on cuda:90 for 16 heads of 128. Larger tiles need the registers of more warps.
    """
    sizes = padded_heads(workload)
    outputs = heads_of_program(workload)[0] * max(sizes["block_d"], sizes["block_dv"])
    small = workload.dtype != "float32" and outputs <= LEAST_TILE * 128
    return bool(workload.cache_dtype) and small and target.arch == "90"


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """About 32 KiB per step; three programs per processor if two steps of each fit, else two.

    Splits come in multiples of a branch's steps, so programs are few and equal: as many as run at
    once, rather than half as many again.
    """
    block_n = default_step(workload)
    step = tile_bytes(workload, block_n)
    two_warps = widens_with_two_warps(workload, target)
    fits = target.shared_memory // 3 >= 2 * step + 8 * 1024
    resident = 3 if fits and not two_warps else 2
    room = (target.shared_memory // resident - 8 * 1024) // step
    return {
        "block_n": block_n,
        "programs": max(n for n in PROGRAMS if n <= max(132, resident * target.num_sms)),
        "num_warps": 2 if two_warps else default_warps(workload),
        "num_stages": max(1, min(2 if two_warps else 3, room)) + 1,
        "combine_warps": 4,
    }
