"""The schedule space of gradients pipelined over specialized warps, for the ops that have one.

The pipelines are shared too: templates/shared/pipeline_dq.py.j2 and pipeline_dk_dv.py.j2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace
from nsagen.codegen.spaces.padding import ds_scale, raw_peak
from nsagen.codegen.spaces.warp_specialized import GLUON, TILE_ROWS, runs_on, supports
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

KEY_TILE = 128
"""Keys of a program of the second pass: 64 for each of two groups of four warps."""

LEAST_STEPS = 16
"""Steps of rows that repay a program for loading a tile of keys and storing two."""


COPY_BYTES = 16
"""A bulk copy's start along a tensor's last dimension is a multiple of this."""


ROW_KNOBS = (
    PowerOfTwo("row_step", 64, 64, "dk, dv: fewer steps against registers"),
    Knob("row_stages", (2, 3, 4), "dk, dv: copies in flight against shared memory"),
    Knob("hide", ("gradients", "scores"), "dk, dv: what masks change; registers"),
)
RULES = (
    Rule("a step holds the heads of a group", lambda w, s, t: int(s.row_step) >= int(w.gqa_ratio)),
)


def supports_gradients(workload: Workload) -> bool:
    """As in the forward pass, but only groups whose statistics start where a bulk copy may.

    lse and delta of a token's group are 4 bytes a head. On an H200, copies for groups of 1 and 2
    ended the kernel with an illegal instruction; those for 4 and more ran.
    """
    return supports(workload) and 4 * int(workload.gqa_ratio) % COPY_BYTES == 0


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The tokens of tiles and steps."""
    group = int(workload.gqa_ratio)
    step = int(schedule.row_step)
    return {
        "tile_tokens": TILE_ROWS // group,
        "step_tokens": step // group,
        "least_chunk": max(1, LEAST_STEPS * step // group),
        "raw_peak": raw_peak(workload),
        "ds_scale": ds_scale(workload),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tiles of the larger pass, and 1 KiB for barriers and alignment."""
    both = int(workload.head_dim) + int(workload.v_head_dim)
    rows = TILE_ROWS + int(schedule.num_stages) * int(schedule.block_n)
    steps = int(schedule.row_stages) * int(schedule.row_step)
    statistics = 8 * steps
    return max(2 * both * rows, 2 * both * (KEY_TILE + steps) + statistics) + 1024


def space(
    op: str,
    knobs: tuple[Knob, ...],
    defaults: dict[str, Param],
    *,
    large_group: int,
    preferred: Callable[[Workload, Target], bool],
) -> ScheduleSpace:
    """The space of an op's backward pass.

    Args:
        knobs: in addition to those of the pipelines.
        defaults: values of all knobs when nothing was measured.
        large_group: query heads per key/value head from which masks hide gradients. With fewer,
            those of more tokens per step spill, so they hide scores.
        preferred: for which workloads it is the default.
    """

    def default(workload: Workload, target: Target) -> dict[str, Param]:
        hide = "gradients" if int(workload.gqa_ratio) >= large_group else "scores"
        return {"hide": hide, **defaults}

    return ScheduleSpace(
        op=op,
        pass_="backward",
        algorithm="warp_specialized",
        knobs=(
            PowerOfTwo("block_n", 64, 128, "dq: fewer steps against registers"),
            Knob("num_stages", (2, 3, 4), "dq: copies in flight against shared memory"),
            *ROW_KNOBS,
            *knobs,
        ),
        rules=RULES,
        derive=derive,
        shared_memory=shared_memory,
        default=default,
        supports=supports_gradients,
        runs_on=runs_on,
        triton=GLUON,
        preferred=preferred,
    )
