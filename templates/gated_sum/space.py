"""The schedule space of the gated sum's forward pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Choice, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The row padded to a power of two."""
    dim = int(workload.v_head_dim)
    return {"block_dv": next_power_of_2(dim), "pad_dv": next_power_of_2(dim) != dim}


def elements(workload: Workload, schedule: Schedule) -> float:
    """Elements of each branch that a thread holds."""
    tile = int(schedule.block_rows) * next_power_of_2(int(workload.v_head_dim))
    return tile / (32 * int(schedule.num_warps))


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Two loads of 16 bytes a thread and branch: six in flight."""
    each = 8 if workload.dtype == "float32" else 16
    rows = 4 * 32 * each // next_power_of_2(int(workload.v_head_dim))
    return {"block_rows": rows, "num_warps": 4}


SPACES = (
    ScheduleSpace(
        op="gated_sum",
        pass_="forward",
        algorithm="row_tiles",
        knobs=(
            PowerOfTwo("block_rows", 1, 256, "rows a program: loads in flight against programs"),
            Choice("num_warps", (1, 2, 4, 8), "threads for the same tile"),
        ),
        rules=(
            Rule(
                "each thread holds 4 to 64 elements of a branch",
                lambda w, s, t: 4 <= elements(w, s) <= 64,
            ),
        ),
        derive=derive,
        default=default,
    ),
)
