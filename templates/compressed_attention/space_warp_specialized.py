"""Schedules of compressed attention on Hopper."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, ScheduleSpace
from nsagen.codegen.spaces import warp_specialized_gradients
from nsagen.codegen.spaces.warp_specialized import GLUON, runs_on, space
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

PROGRAMS = PowerOfTwo("programs", 512, 8192, "dk, dv: even work against parts to add up")


def derive_stored(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    return {**warp_specialized_gradients.derive(workload, schedule), "stores_ds": True}


def stored_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the pipeline's tiles and of ds on its way out."""
    both, step = int(workload.head_dim) + int(workload.v_head_dim), int(schedule.row_step)
    steps, keys = int(schedule.row_stages) * step, warp_specialized_gradients.KEY_TILE
    return 2 * both * (keys + steps) + 12 * steps + 2 * keys * step + 1024


def default_stored(workload: Workload, target: Target) -> dict[str, Param]:
    """Of the pipeline, what warp_specialized has. Where shared memory is full, fewer steps."""
    wide = int(workload.head_dim) + int(workload.v_head_dim) == 256
    return {
        **{"block_n": 64, "num_stages": 3, "dq_warps": 8 if wide else 4},
        **{"row_step": 64, "row_stages": 4, "hide": "gradients"},
        **{"programs": 2048, "workspace": 2048},
    }


def prefers_pipeline(workload: Workload, target: Target) -> bool:
    """Large groups; and groups of 8 and 4 heads of 128 in bfloat16, which on an H200 took 0.66 and
    0.65 of two_passes' time at 65536 tokens, and 1.11 and 1.02 at 8192."""
    group, dims = int(workload.gqa_ratio), {int(workload.head_dim), int(workload.v_head_dim)}
    return group >= 16 or (group in (4, 8) and workload.dtype == "bfloat16" and dims == {128})


SPACES = (
    space("compressed_attention", block_n=128, preferred=True),
    ScheduleSpace(
        op="compressed_attention",
        pass_="backward",
        algorithm="stored_ds",
        knobs=(
            PowerOfTwo("block_n", 32, 128, "dq: fewer steps against registers"),
            Knob("num_stages", (2, 3, 4), "dq: steps that are loading, against shared memory"),
            Knob("dq_warps", (4, 8), "dq: registers against programs at a time"),
            *warp_specialized_gradients.ROW_KNOBS,
            PROGRAMS,
            PowerOfTwo("workspace", 256, 16384, "MiB of ds: fewer and longer ranges"),
        ),
        rules=warp_specialized_gradients.RULES,
        derive=derive_stored,
        shared_memory=stored_memory,
        default=default_stored,
        supports=warp_specialized_gradients.supports_gradients,
        runs_on=runs_on,
        triton=GLUON,
        # On an H200, groups of 16 heads of 128: 0.88 of warp_specialized's time at 65536 and 131072
        # tokens, 0.92 at 32768, 1.06 at 8192. But its 2 GiB of ds come on top of what a whole
        # backward pass holds, so tuning decides.
        preferred=lambda workload, target: False,
    ),
    warp_specialized_gradients.space(
        "compressed_attention",
        (PROGRAMS,),
        {"block_n": 64, "num_stages": 3, "row_step": 64, "row_stages": 4, "programs": 2048},
        large_group=16,
        preferred=prefers_pipeline,
    ),
)
