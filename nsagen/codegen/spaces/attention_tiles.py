"""What the schedule spaces of attention over contiguous keys share.

`row_tiles` walks the keys of a tile of rows forward. `two_passes` differentiates: one pass over
tiles of rows computes dq, another over tiles of keys dk and dv. The spaces are with the templates:
templates/sliding_window_attention/space.py and templates/compressed_attention/space.py.
"""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, next_power_of_2
from nsagen.codegen.spaces.padding import (
    SCRATCH,
    buffers,
    ds_scale,
    element_bytes,
    multiplies_from_shared_memory,
    padded_heads,
    raw_peak,
)
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

ROW_TILES_KNOBS = (
    PowerOfTwo("block_m", 16, 256, "rows a program: reuse of each key against registers"),
    PowerOfTwo("block_n", 16, 128, "keys a step: fewer steps against waste in masked ones"),
    Knob("num_warps", (1, 2, 4, 8), "threads a tile against programs a multiprocessor"),
    Knob("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
    Knob(
        "loads",
        ("pointers", "descriptors"),
        '"descriptors" copy in bulk with few registers, and need a second loop at the end',
    ),
)

TWO_PASSES_KNOBS = (
    PowerOfTwo("block_m", 16, 128, "dq: rows a program: reuse of each key against registers"),
    PowerOfTwo("block_n", 16, 128, "dq: keys a step: fewer steps against registers"),
    Knob("num_warps", (4, 8), "dq: threads for the same tile"),
    Knob("num_stages", (1, 2, 3), "dq: steps that are loading, against shared memory"),
    PowerOfTwo("key_tile", 16, 128, "dk, dv: keys a program: reuse of each row against registers"),
    PowerOfTwo("row_step", 16, 128, "dk, dv: rows a step: fewer steps against registers"),
    Knob("dkv_warps", (4, 8), "dk, dv: threads for the same tile"),
    Knob("dkv_stages", (1, 2, 3), "dk, dv: steps that are loading, against shared memory"),
)


def padded_sizes(workload: Workload) -> tuple[int, int]:
    """head_dim and v_head_dim, padded to powers of two."""
    sizes = padded_heads(workload)
    return sizes["block_d"], sizes["block_dv"]


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Head sizes padded to powers of two, and how exact the softmax has to be."""
    return {**padded_heads(workload), "raw_peak": raw_peak(workload)}


def derive_two_passes(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The values of `derive`, and whether a step of rows begins with a token's first head."""
    aligned = int(schedule.row_step) % int(workload.gqa_ratio) == 0
    return {
        **derive(workload, schedule),
        "ds_scale": ds_scale(workload),
        "whole_tokens": aligned,
    }


def row_tiles_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the query tile and of the key and value tiles in flight."""
    block_d, block_dv = padded_sizes(workload)
    keys = int(schedule.num_stages) * int(schedule.block_n)
    return element_bytes(workload) * (int(schedule.block_m) * block_d + keys * (block_d + block_dv))


def two_passes_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tiles that a program keeps and of those in flight, in the larger pass."""
    keys = buffers(workload, int(schedule.num_stages)) * int(schedule.block_n)
    rows = buffers(workload, int(schedule.dkv_stages)) * int(schedule.row_step)
    rows_of_tiles = max(int(schedule.block_m) + keys, int(schedule.key_tile) + rows)
    return element_bytes(workload) * rows_of_tiles * sum(padded_sizes(workload))


def row_tiles_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of the probabilities where a product takes them from shared memory; of the results,
    which change their layout where the steps' tiles were."""
    block_m, block_n = int(schedule.block_m), int(schedule.block_n)
    block_d, block_dv = padded_sizes(workload)
    scores = element_bytes(workload) * block_m * block_n
    scores = scores if multiplies_from_shared_memory(target) else 0
    steps = element_bytes(workload) * int(schedule.num_stages) * block_n * (block_d + block_dv)
    results = 4 * block_m * block_dv - steps if target.backend == "cuda" else 0
    return SCRATCH + max(scores, results)


def two_passes_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of a step's rows in the layout of its second product, and of gradients of scores."""
    if target.backend == "hip":
        return 0
    widest = max(padded_sizes(workload))
    block_n, row_step = int(schedule.block_n), int(schedule.row_step)
    steps = element_bytes(workload) * widest * max(block_n, row_step)
    return (
        steps
        + 4 * max(int(schedule.block_m) * block_n, int(schedule.key_tile) * row_step)
        + SCRATCH
    )


def row_tiles_registers(workload: Workload, schedule: Schedule) -> int:
    """Registers per thread for the scores and the output tile, both float32."""
    columns = int(schedule.block_n) + padded_sizes(workload)[1]
    return int(schedule.block_m) * columns // (32 * int(schedule.num_warps))


def two_passes_registers(workload: Workload, schedule: Schedule) -> int:
    """Registers per thread for gradients, scores and their gradients in the larger pass."""
    block_d, block_dv = padded_sizes(workload)
    dq = int(schedule.block_m) * (block_d + 2 * int(schedule.block_n))
    dkv = int(schedule.key_tile) * (block_d + block_dv + 2 * int(schedule.row_step))
    return max(dq // int(schedule.num_warps), dkv // int(schedule.dkv_warps)) // 32


ROW_TILES_RULES = (
    Rule(
        "a tile must give each warp 8 rows or more: two warps share those of a matrix instruction",
        lambda w, s, t: w.dtype == "float32" or int(s.block_m) >= 8 * int(s.num_warps),
    ),
    Rule(
        "scores and output must fit the registers: at most 256 a thread",
        lambda w, s, t: row_tiles_registers(w, s) <= 256,
    ),
    Rule(
        "descriptors need a target with bulk tensor copies",
        lambda w, s, t: s.loads == "pointers" or t.has_tma,
    ),
)

TWO_PASSES_RULES = (
    Rule(
        "gradients and scores must fit the registers: at most 256 a thread",
        lambda w, s, t: two_passes_registers(w, s) <= 256,
    ),
)


def row_tiles_default(workload: Workload, target: Target) -> dict[str, Param]:
    """Tiles that fill the matrix units without spills, compiled with Triton 3.6 and 3.9."""
    widest = max(padded_sizes(workload))
    loads = "pointers"
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        block_m, block_n, warps, stages = (32, 32, 4, 1) if widest <= 64 else (16, 16, 4, 1)
    elif target.has_wgmma:
        group = int(workload.gqa_ratio)
        few = widest > 128 or group != next_power_of_2(group)  # otherwise rows take many divisions
        block_m, block_n, warps, stages = (128, 64 if few else 128, 8, 2)
        if padded_sizes(workload)[1] > 128:  # the output tile alone takes 128 registers a thread
            block_m = 64
        loads = "descriptors"
    elif target.shared_memory < 96 * 1024:
        block_m, block_n, warps, stages = (64, 32, 4, 1) if widest <= 128 else (64, 16, 4, 1)
    elif widest > 128 or target.shared_memory < 128 * 1024:
        block_m, block_n, warps, stages = (64, 32, 4 if widest <= 128 else 8, 2)
        if target.arch == "100":  # with two stages, some shapes spill
            stages = 3
    elif widest > 64:
        block_m, block_n, warps, stages = (128, 64, 8, 3)
    else:  # a third stage spills; with heads of 32, long steps also spill
        block_m, block_n, warps, stages = (128, 64 if widest > 32 else 32, 8, 2)
        if target.arch == "100" and widest <= 32:  # eight warps get 64 registers a thread
            warps = 4
    return {
        "block_m": block_m,
        "block_n": block_n,
        "num_warps": warps,
        "num_stages": stages,
        "loads": loads,
    }


_HOPPER_KEYS: dict[str, Param] = {"key_tile": 64, "row_step": 32, "dkv_warps": 4, "dkv_stages": 3}
HOPPER_TILES: dict[str, dict[str, Param]] = {
    "sliding_window_attention": {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2},
    "compressed_attention": {
        **{"block_m": 128, "block_n": 16, "num_warps": 4, "num_stages": 3},
        "programs": 2048,
    },
}
"""Of two passes, for 16-bit types and heads up to 128."""


def two_passes_default(workload: Workload, target: Target) -> dict[str, Param]:
    """Tiles without significant spills, compiled with Triton 3.6 and 3.9."""
    widest = max(padded_sizes(workload))
    roomy = target.shared_memory >= 128 * 1024
    stages = 2 if roomy and workload.dtype != "float32" else 1
    dq_warps = dkv_warps = 4
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        dq = dkv = (32, 32) if widest <= 64 else (16, 16)
        dq_warps = 8
        if widest > 64 and target.backend == "hip":  # whose four warps have twice the threads
            dq_warps = 4
        elif widest > 64:  # with one stage, operands go through registers, and spill
            stages, dkv_warps = 2, 8
    elif widest > 128 and roomy:
        dq, dkv, dq_warps, dkv_warps = (64, 32), (32, 32), 4 if target.arch == "100" else 8, 8
        group, sizes = int(workload.gqa_ratio), padded_heads(workload)
        odd, padded = group != next_power_of_2(group), sizes["pad_d"] or sizes["pad_dv"]
        narrowest = min(sizes["block_d"], sizes["block_dv"])
        if target.arch == "100" and odd:  # rows take many divisions
            dkv = (32 if padded and narrowest > 64 else 64, 16)
        if target.arch == "100" and padded:  # and loads many masks
            dq = (32 if odd or narrowest > 128 else 64, 32)
    elif widest > 128:
        dq = dkv = (32, 16)
    elif target.has_wgmma:  # the fastest for 2048 and 16384 tokens on an H200
        return HOPPER_TILES[workload.op] | _HOPPER_KEYS
    else:
        dq = dkv = (64, 32)
        if widest > 64 and target.backend == "cuda":  # four warps spill
            dkv_warps = 8
    # On cuda:120 four warps spill without a second stage of rows.
    dkv_stages = 2 if target.arch == "120" and dq_warps == dkv_warps == 4 else stages
    return {
        **dict(zip(("block_m", "block_n"), dq, strict=True)),
        **{"num_warps": dq_warps, "num_stages": stages},
        **dict(zip(("key_tile", "row_step"), dkv, strict=True)),
        **{"dkv_warps": dkv_warps, "dkv_stages": dkv_stages},
    }
