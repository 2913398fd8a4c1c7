"""The schedule spaces of the gated sum: both passes move rows and have the same knobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

Default = Callable[[Workload, Target], Mapping[str, Param]]


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The row padded to a power of two."""
    dim = int(workload.v_head_dim)
    return {"block_dv": next_power_of_2(dim), "pad_dv": next_power_of_2(dim) != dim}


def elements(workload: Workload, schedule: Schedule) -> float:
    """Elements of each branch that a thread holds."""
    tile = int(schedule.block_rows) * next_power_of_2(int(workload.v_head_dim))
    return tile / (32 * int(schedule.num_warps))


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a number a row and warp, which sums across warps take."""
    return 4 * int(schedule.block_rows) * int(schedule.num_warps)


def default_forward(workload: Workload, target: Target) -> dict[str, Param]:
    """Two loads of 16 bytes per thread and branch: six in flight."""
    each = 8 if workload.dtype == "float32" else 16
    rows = 4 * 32 * each // next_power_of_2(int(workload.v_head_dim))
    return {"block_rows": rows, "num_warps": 4}


def default_backward(workload: Workload, target: Target) -> dict[str, Param]:
    """One load of 16 bytes per thread and tensor: do and the branches make four in flight."""
    each = 4 if workload.dtype == "float32" else 8
    rows = 4 * 32 * each // next_power_of_2(int(workload.v_head_dim))
    return {"block_rows": rows, "num_warps": 4}


def row_tiles(pass_: str, default: Default, most: int) -> ScheduleSpace:
    """The space of a pass whose threads hold up to `most` elements of each tensor."""
    return ScheduleSpace(
        op="gated_sum",
        pass_=pass_,
        algorithm="row_tiles",
        knobs=(
            PowerOfTwo("block_rows", 1, 256, "rows a program: loads in flight against programs"),
            Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
        ),
        rules=(
            Rule(
                f"each thread holds 4 to {most} elements of a tensor",
                lambda w, s, t: 4 <= elements(w, s) <= most,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    )


SPACES = (row_tiles("forward", default_forward, 64), row_tiles("backward", default_backward, 32))
