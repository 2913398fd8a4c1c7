"""What the schedule spaces of attention's two-pass gradients share.

One pass over tiles of rows computes dq, one over tiles of keys dk and dv; both recompute the
scores. Templates: templates/*/backward_two_passes.py.j2.
"""

from __future__ import annotations

from nsagen.codegen.space import Choice, PowerOfTwo, Rule, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload

KNOBS = (
    PowerOfTwo("block_m", 16, 128, "dq: rows a program: reuse of each key against registers"),
    PowerOfTwo("block_n", 16, 128, "dq: keys a step: fewer steps against registers"),
    Choice("num_warps", (4, 8), "dq: threads for the same tile"),
    Choice("num_stages", (1, 2, 3), "dq: steps that are loading, against shared memory"),
    PowerOfTwo("key_tile", 16, 128, "dk, dv: keys a program: reuse of each row against registers"),
    PowerOfTwo("row_step", 16, 128, "dk, dv: rows a step: fewer steps against registers"),
    Choice("dkv_warps", (4, 8), "dk, dv: threads for the same tile"),
    Choice("dkv_stages", (1, 2, 3), "dk, dv: steps that are loading, against shared memory"),
)


def padded_sizes(workload: Workload) -> tuple[int, int]:
    """head_dim and v_head_dim, padded to powers of two."""
    return next_power_of_2(int(workload.head_dim)), next_power_of_2(int(workload.v_head_dim))


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tiles that a program keeps and those on their way, in the larger pass."""
    width = 4 if workload.dtype == "float32" else 2
    rows_of_tiles = max(
        int(schedule.block_m) + int(schedule.num_stages) * int(schedule.block_n),
        int(schedule.key_tile) + int(schedule.dkv_stages) * int(schedule.row_step),
    )
    return width * rows_of_tiles * sum(padded_sizes(workload))


def registers(workload: Workload, schedule: Schedule) -> int:
    """Registers a thread that gradients, scores and their gradients take in the larger pass."""
    block_d, block_dv = padded_sizes(workload)
    dq = int(schedule.block_m) * (block_d + 2 * int(schedule.block_n))
    dkv = int(schedule.key_tile) * (block_d + block_dv + 2 * int(schedule.row_step))
    return max(dq // int(schedule.num_warps), dkv // int(schedule.dkv_warps)) // 32


RULES = (
    Rule(
        "gradients and scores must fit the registers: at most 256 a thread",
        lambda w, s, t: registers(w, s) <= 256,
    ),
)


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Tiles that spill nothing worth mentioning, compiled with Triton 3.6 and 3.9."""
    widest = max(padded_sizes(workload))
    roomy = target.shared_memory >= 128 * 1024
    stages = 2 if roomy and workload.dtype != "float32" else 1
    dq_warps = dkv_warps = 4
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        dq = dkv = (32, 32) if widest <= 64 else (16, 16)
        dq_warps = 8
    elif widest > 128 and roomy:
        dq, dkv, dq_warps = (64, 32), (32, 32), 8
    elif widest > 128:
        dq = dkv = (32, 16)
    elif target.has_wgmma:
        dq, dkv, dkv_warps = (64, 64), (128, 32), 8
    else:
        dq = dkv = (64, 32)
    return {
        **dict(zip(("block_m", "block_n"), dq, strict=True)),
        **{"num_warps": dq_warps, "num_stages": stages},
        **dict(zip(("key_tile", "row_step"), dkv, strict=True)),
        **{"dkv_warps": dkv_warps, "dkv_stages": stages},
    }
