"""The schedule spaces of sliding-window attention: forward and backward."""

from __future__ import annotations

from typing import Any

from nsagen.codegen import two_passes
from nsagen.codegen.space import Choice, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload

LEAST_TILE = 16
"""The least side of a tile that tl.dot multiplies."""


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, and how a tile's keys split into steps.

    A tile that starts at token `first` and has T = tile_tokens sees the keys first - W + 1 to
    first + T - 1. All its rows see the keys first + T - W to first, so masks are needed for the
    T - 1 keys after those, which diagonal_steps cover, and for what is left before them.
    """
    group, window = int(workload.gqa_ratio), int(workload.window_size)
    block_m, block_n = int(schedule.block_m), int(schedule.block_n)
    # A tile starts at a token's first head if G divides block_m, else anywhere in its group.
    tile_tokens = block_m // group if block_m % group == 0 else -(-(block_m - 1) // group) + 1
    diagonal_steps = -(-(tile_tokens - 1) // block_n)
    middle_steps = max(0, window - diagonal_steps * block_n) // block_n
    rest = window + tile_tokens - 1 - (diagonal_steps + middle_steps) * block_n
    rest_n = max(LEAST_TILE, next_power_of_2(rest % block_n)) if rest % block_n > 0 else 0
    return {
        **padded(workload),
        "tile_tokens": tile_tokens,
        "diagonal_steps": diagonal_steps,
        "middle_steps": middle_steps,
        "rest_n": rest_n if rest > 0 and rest_n < block_n else 0,
    }


def derive_backward(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """What `derive` gives for the pass over rows, and how a key tile's rows split into steps.

    The tile that starts at token `first` and has T = key_tile keys is seen whole by the rows of
    the tokens first + T - 1 to first + W - 1. No narrower last step of keys here: its layouts
    cost every target registers that spill.
    """
    group, window = int(workload.gqa_ratio), int(workload.window_size)
    key_tile, row_step = int(schedule.key_tile), int(schedule.row_step)
    early = -(-(key_tile - 1) * group // row_step)
    return {
        **derive(workload, schedule),
        "rest_n": 0,
        "early_row_steps": early,
        "middle_row_steps": max(0, window * group // row_step - early),
        "step_offset": "start % GROUP" if row_step % group else "0",
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
    """Bytes of the query tile and of the key and value tiles that are on their way."""
    width = 4 if workload.dtype == "float32" else 2
    sizes = padded(workload)
    q_tile = int(schedule.block_m) * sizes["block_d"]
    kv_tile = int(schedule.block_n) * (sizes["block_d"] + sizes["block_dv"])
    return width * (q_tile + int(schedule.num_stages) * kv_tile)


def accumulators(workload: Workload, schedule: Schedule) -> int:
    """Registers a thread that the scores and the output tile take, both float32."""
    columns = int(schedule.block_n) + padded(workload)["block_dv"]
    return int(schedule.block_m) * columns // (32 * int(schedule.num_warps))


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """The largest tile whose accumulators leave registers for what else a step needs."""
    widest = max(padded(workload)["block_d"], padded(workload)["block_dv"])
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        if widest <= 64:
            return {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1}
        return {"block_m": 32, "block_n": 16, "num_warps": 8, "num_stages": 1}
    if target.has_wgmma:
        stages = 3 if widest <= 128 else 2
        return {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": stages}
    if widest <= 128:
        return {"block_m": 128, "block_n": 32, "num_warps": 8, "num_stages": 3}
    return {"block_m": 64, "block_n": 16, "num_warps": 4, "num_stages": 2}


SPACES = (
    ScheduleSpace(
        op="sliding_window_attention",
        pass_="forward",
        algorithm="row_tiles",
        knobs=(
            PowerOfTwo("block_m", 16, 256, "rows a program: reuse of each key against registers"),
            PowerOfTwo("block_n", 16, 128, "keys a step: fewer steps against shared memory"),
            Choice("num_warps", (1, 2, 4, 8), "threads for the same tile"),
            Choice("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
        ),
        rules=(
            Rule(
                "a warp multiplies 16 rows or more, as matrix instructions do",
                lambda w, s, t: w.dtype == "float32" or s.block_m >= 16 * s.num_warps,
            ),
            Rule(
                "scores and output fit the registers",
                lambda w, s, t: accumulators(w, s) <= 256,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    ),
    ScheduleSpace(
        op="sliding_window_attention",
        pass_="backward",
        algorithm="two_passes",
        knobs=two_passes.KNOBS,
        rules=two_passes.RULES,
        derive=derive_backward,
        shared_memory=two_passes.shared_memory,
        default=two_passes.default,
    ),
)
