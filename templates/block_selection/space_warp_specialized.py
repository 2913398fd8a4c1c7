"""The schedule space of block selection on Hopper."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, ScheduleSpace
from nsagen.codegen.spaces import warp_specialized
from nsagen.core.workload import Schedule, Workload

COLUMNS = 128
"""Columns of a tile: tokens, each with all heads of a group."""


def step(workload: Workload) -> int:
    """Windows that start in a block."""
    return int(workload.block_size) // int(workload.kernel_stride)


def supports(workload: Workload) -> bool:
    """What the pipeline takes, and blocks that 64 windows are a whole number of."""
    fits = workload.dtype != "float32" and workload.head_dim in (64, 128)
    fits &= (workload.score_norm, workload.score_heads) == ("softmax", "sum")
    group, windows = int(workload.gqa_ratio), step(workload)
    return fits and COLUMNS % group == 0 and group <= 64 and 64 % windows == 0


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Windows and blocks in units of kernel_stride, and the tokens of a tile."""
    width = int(workload.kernel_size) // int(workload.kernel_stride)
    return {
        "tile_tokens": COLUMNS // int(workload.gqa_ratio),
        "step": step(workload),
        "overlap": int(workload.gqa_ratio) >= 16,
        "pairs": int(workload.gqa_ratio) == 16 and int(workload.head_dim) == 128,
        "width": width,
        # The last window of a block starts at unit step - 1 and covers `width` units.
        "spill": (step(workload) + width - 2) // step(workload),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of two tiles of queries and of the keys in flight, and 1 KiB for barriers."""
    return 2 * COLUMNS * int(workload.head_dim) * (2 + int(schedule.num_stages)) + 1024


SPACES = (
    ScheduleSpace(
        op="block_selection",
        pass_="forward",
        algorithm="warp_specialized",
        knobs=(
            Knob("num_stages", (2, 3, 4), "copies in flight against shared memory"),
            Knob("workspace", (32, 64, 128, 256, 512), "launches against memory, in MiB"),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=lambda workload, target: {"num_stages": 4, "workspace": 256},
        supports=supports,
        runs_on=warp_specialized.runs_on,
        triton=warp_specialized.GLUON,
        # With fewer heads to sum, the sums themselves take the registers, and some of them spill.
        preferred=lambda workload, target: int(workload.gqa_ratio) >= 4,
    ),
)
