"""Schedules of Native Sparse Attention's decode pass: selected and sliding branches, and gates."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Choice, PowerOfTwo, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload

# Two and three a processor of the targets, and more.
_PROGRAMS = (132, 216, 264, 324, 396, 444, 528, 1056, 2112)
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and the steps that each branch takes."""
    block_d, block_dv = next_power_of_2(workload.head_dim), next_power_of_2(workload.v_head_dim)
    block_pad = next_power_of_2(workload.block_size)
    selected_tiles = -(-workload.topk * block_pad // schedule.block_n)
    return {
        "block_d": block_d,
        "block_dv": block_dv,
        "pad_d": block_d != workload.head_dim,
        "pad_dv": block_dv != workload.v_head_dim,
        "group_pad": max(16, next_power_of_2(workload.gqa_ratio)),
        "block_pad": block_pad,
        "topk_pad": next_power_of_2(-(-selected_tiles * schedule.block_n // block_pad)),
        "selected_tiles": selected_tiles,
        "window_tiles": -(-workload.window_size // schedule.block_n),
        "dot_precision": ', input_precision="ieee"' if workload.dtype == "float32" else "",
    }


def _tile_bytes(workload: Workload, block_n: int) -> int:
    dims = next_power_of_2(workload.head_dim) + next_power_of_2(workload.v_head_dim)
    return block_n * dims * _BYTES[workload.dtype]


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """The steps in flight, of which the current one is in registers, queries and scores."""
    group = max(16, next_power_of_2(workload.gqa_ratio))
    queries = group * next_power_of_2(workload.head_dim) * _BYTES[workload.dtype]
    scores = group * schedule.block_n * 4
    steps = max(1, schedule.num_stages - 1)
    return steps * _tile_bytes(workload, schedule.block_n) + queries + scores


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """About 32 KiB a step; three programs a processor where two steps of each fit, else two.

    Splits come in multiples of a branch's steps, so that programs are few and equal: as many as
    run at once, and not half as many again.
    """
    block_n = 64
    while block_n > 16 and _tile_bytes(workload, block_n) > 32 * 1024:
        block_n //= 2
    step = _tile_bytes(workload, block_n)
    resident = 3 if target.shared_memory // 3 >= 2 * step + 8 * 1024 else 2
    room = (target.shared_memory // resident - 8 * 1024) // step
    return {
        "block_n": block_n,
        "programs": max(n for n in _PROGRAMS if n <= max(132, resident * target.num_sms)),
        # float32 products run without matrix instructions and hold their tiles in registers.
        "num_warps": 8 if workload.dtype == "float32" else 4,
        "num_stages": max(1, min(3, room)) + 1,
        "combine_warps": 4,
    }


SPACES = (
    ScheduleSpace(
        op="native_sparse_attention",
        pass_="decode",
        algorithm="split_kv",
        knobs=(
            PowerOfTwo("block_n", 16, 256, "latency hidden against registers"),
            Choice("programs", _PROGRAMS, "a full GPU against combining"),
            Choice("num_warps", (1, 2, 4, 8), "registers a thread against programs that fit"),
            Choice("num_stages", (1, 2, 3, 4, 5), "loads in flight against shared memory"),
            Choice("combine_warps", (1, 2, 4, 8), "lanes against barriers of the second kernel"),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    ),
)
