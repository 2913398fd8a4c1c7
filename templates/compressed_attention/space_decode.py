"""Schedules of compressed attention's decode pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Choice, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload

# Two and three a processor of the targets, and more.
_PROGRAMS = (132, 216, 264, 324, 396, 444, 528, 1056, 2112)
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_MAX_WINDOWS = 256
_SCORES_A_THREAD = 8
"""Of a head and block: few enough that the code is short, as it runs once and must be fetched."""


def _step_pad(workload: Workload) -> int:
    return next_power_of_2(workload.block_size // workload.kernel_stride)


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and windows and blocks in units of kernel_stride."""
    step = workload.block_size // workload.kernel_stride
    width = workload.kernel_size // workload.kernel_stride
    block_d, block_dv = next_power_of_2(workload.head_dim), next_power_of_2(workload.v_head_dim)
    heads_pad = next_power_of_2(workload.gqa_ratio)
    scores_at_once = 32 * schedule.combine_warps * _SCORES_A_THREAD
    return {
        "block_d": block_d,
        "block_dv": block_dv,
        "pad_d": block_d != workload.head_dim,
        "pad_dv": block_dv != workload.v_head_dim,
        "group_pad": max(16, next_power_of_2(workload.gqa_ratio)),
        "heads_pad": heads_pad,
        "topk_pad": next_power_of_2(workload.topk),
        "step": step,
        "step_pad": _step_pad(workload),
        "width": width,
        # The last window of a block starts at unit step - 1 and covers `width` units.
        "spill": (step + width - 2) // step,
        "scored": max(16, scores_at_once // heads_pad),
        "scores_at_once": scores_at_once,
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
    """About 32 KiB a step, as many of them in flight as leave room for two programs a processor."""
    block_n = 64
    while block_n > 16 and _tile_bytes(workload, block_n) > 32 * 1024:
        block_n //= 2
    block_n = max(block_n, _step_pad(workload))
    room = (target.shared_memory // 2 - 8 * 1024) // _tile_bytes(workload, block_n)
    return {
        "block_n": block_n,
        "programs": max(n for n in _PROGRAMS if n <= max(132, 2 * target.num_sms)),
        # float32 products run without matrix instructions and hold their tiles in registers.
        "num_warps": 8 if workload.dtype == "float32" else 4,
        "num_stages": max(1, min(3, room)) + 1,
        "combine_warps": 1 if target.arch == "120" else 4,  # more spill there, for some groups
    }


SPACES = (
    ScheduleSpace(
        op="compressed_attention",
        pass_="decode",
        algorithm="split_kv",
        knobs=(
            PowerOfTwo("block_n", 16, _MAX_WINDOWS, "latency hidden against registers"),
            Choice("programs", _PROGRAMS, "a full GPU against combining"),
            Choice("num_warps", (1, 2, 4, 8), "registers a thread against programs that fit"),
            Choice("num_stages", (1, 2, 3, 4, 5), "loads in flight against shared memory"),
            Choice("combine_warps", (1, 2, 4, 8), "lanes against barriers of the second kernel"),
        ),
        rules=(
            Rule(
                "block_n must hold the windows of a whole block",
                lambda w, s, t: s.block_n >= _step_pad(w),
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
        supports=lambda workload: _step_pad(workload) <= _MAX_WINDOWS,
    ),
)
