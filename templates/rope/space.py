"""The schedule space of rope's forward pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Half a row, and that padded to a power of two."""
    half = int(workload.head_dim) // 2
    block_half = next_power_of_2(half)
    return {"half": half, "block_half": block_half, "pad_half": block_half != half}


def elements(workload: Workload, schedule: Schedule) -> float:
    """Elements of each half that a thread holds; as many cosines and sines."""
    tile = int(schedule.block_rows) * next_power_of_2(int(workload.head_dim) // 2)
    return tile / (32 * int(schedule.num_warps))


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a half that changes its layout."""
    return 4 * int(schedule.block_rows) * next_power_of_2(int(workload.head_dim) // 2)


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """A load of 16 bytes per thread and half."""
    each = 4 if workload.dtype == "float32" else 8
    rows = 4 * 32 * each // next_power_of_2(int(workload.head_dim) // 2)
    return {"block_rows": rows, "num_warps": 4}


SPACES = (
    ScheduleSpace(
        op="rope",
        pass_="forward",
        algorithm="row_tiles",
        knobs=(
            PowerOfTwo("block_rows", 1, 256, "rows a program: loads in flight against programs"),
            Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
        ),
        rules=(
            Rule(
                "each thread holds 4 to 32 elements of a half",
                lambda w, s, t: 4 <= elements(w, s) <= 32,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    ),
)
