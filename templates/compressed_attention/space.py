"""The schedule spaces of compressed attention: forward and backward."""

from __future__ import annotations

from typing import Any

from nsagen.codegen import two_passes
from nsagen.codegen.space import Choice, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload

LEAST_STEPS = 16
"""Steps of rows that make it worth a program's while to load a tile of windows and store two."""


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
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


def derive_backward(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """What `derive` gives, and how rows split into steps and chunks."""
    group, row_step = int(workload.gqa_ratio), int(schedule.row_step)
    return {
        **derive(workload, schedule),
        "step_offset": "start % GROUP" if row_step % group else "0",
        "least_chunk": max(1, LEAST_STEPS * row_step // group),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the query tile and of the key and value tiles that are on their way."""
    width = 4 if workload.dtype == "float32" else 2
    sizes = derive(workload, schedule)
    q_tile = int(schedule.block_m) * sizes["block_d"]
    kv_tile = int(schedule.block_n) * (sizes["block_d"] + sizes["block_dv"])
    return width * (q_tile + int(schedule.num_stages) * kv_tile)


def registers(workload: Workload, schedule: Schedule) -> int:
    """Registers a thread that the scores and the output tile take, both float32."""
    columns = int(schedule.block_n) + derive(workload, schedule)["block_dv"]
    return int(schedule.block_m) * columns // (32 * int(schedule.num_warps))


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Tiles that fill the matrix units and spill nothing worth mentioning.

    Compiled for cuda:80 and cuda:90 with Triton 3.6 and 3.9 at head sizes 16 to 256.
    """
    wide = next_power_of_2(max(int(workload.head_dim), int(workload.v_head_dim))) > 128
    if workload.dtype == "float32":  # no matrix instruction is exact: short tiles of plain FMA
        block_m = 16 if wide else 32
        return {"block_m": block_m, "block_n": 16, "num_warps": 4, "num_stages": 1}
    if target.has_wgmma:
        block_n = 64 if wide else 128
        return {"block_m": 128, "block_n": block_n, "num_warps": 8, "num_stages": 2}
    if target.shared_memory < 96 * 1024:
        block_n = 16 if wide else 32
        return {"block_m": 64, "block_n": block_n, "num_warps": 4, "num_stages": 1}
    if wide:
        return {"block_m": 64, "block_n": 32, "num_warps": 8, "num_stages": 2}
    if target.shared_memory < 128 * 1024:
        return {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
    return {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}


SPACES = (
    ScheduleSpace(
        op="compressed_attention",
        pass_="forward",
        algorithm="row_tiles",
        knobs=(
            PowerOfTwo("block_m", 16, 256, "reuse of each window against registers"),
            PowerOfTwo("block_n", 16, 256, "fewer steps against waste in the masked last one"),
            Choice("num_warps", (2, 4, 8), "threads a tile against programs a multiprocessor"),
            Choice("num_stages", (1, 2, 3, 4), "loads in flight against shared memory"),
        ),
        rules=(
            Rule(
                "scores and outputs must fit the registers: at most 256 a thread",
                lambda w, s, t: registers(w, s) <= 256,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    ),
    ScheduleSpace(
        op="compressed_attention",
        pass_="backward",
        algorithm="two_passes",
        knobs=(
            *two_passes.KNOBS,
            PowerOfTwo("programs", 1024, 8192, "dk, dv: even work against parts to add up"),
        ),
        rules=two_passes.RULES,
        derive=derive_backward,
        shared_memory=two_passes.shared_memory,
        default=lambda w, t: {**two_passes.default(w, t), "programs": 4096},
    ),
)
