"""The schedule space of the log-sum-exp of compressed attention's scores."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import element_bytes, few_bytes, raw_peak
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The padded head size, and how exact the sum has to be."""
    return {
        "block_d": next_power_of_2(int(workload.head_dim)),
        "raw_peak": raw_peak(workload),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the query tile and of the key tiles in flight."""
    rows = int(schedule.block_m) + int(schedule.num_stages) * int(schedule.block_n)
    return element_bytes(workload) * rows * next_power_of_2(int(workload.head_dim))


def registers(schedule: Schedule) -> int:
    """Registers a thread for the scores, float32."""
    return int(schedule.block_m) * int(schedule.block_n) // (32 * int(schedule.num_warps))


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Tiles that fill the matrix units without spills."""
    wide = int(workload.head_dim) > 128
    roomy = target.shared_memory >= 128 * 1024
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        few = 32 if int(workload.head_dim) <= 64 else 16  # operands of more go through the stack
        block_m, block_n, warps, stages = few, few, 4, 1
    elif target.has_wgmma:
        block_m, block_n, warps, stages = 128, 64 if wide else 128, 8, 2  # a third one is slower
    elif roomy:
        block_m, block_n, warps, stages = 128, 32 if wide else 64, 8, 3
    else:
        block_m, block_n, warps, stages = 64, 32, 4, 1 if wide else 2
    return {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}


SPACES = (
    ScheduleSpace(
        op="compressed_lse",
        pass_="forward",
        algorithm="row_tiles",
        knobs=(
            PowerOfTwo("block_m", 16, 256, "rows a program: reuse of each key against registers"),
            PowerOfTwo("block_n", 16, 256, "keys a step: fewer steps against waste in masked ones"),
            Knob("num_warps", (1, 2, 4, 8), "threads a tile against programs a multiprocessor"),
            Knob("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
        ),
        rules=(
            Rule(
                "a tile must give each warp 8 rows or more: two warps share those of a matrix "
                "instruction",
                lambda w, s, t: w.dtype == "float32" or int(s.block_m) >= 8 * int(s.num_warps),
            ),
            Rule(
                "scores must fit the registers: at most 128 a thread",
                lambda w, s, t: registers(s) <= 128,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        scratch=few_bytes,
        default=default,
    ),
)
