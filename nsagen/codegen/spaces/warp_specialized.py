"""The schedule space of attention pipelined over specialized warps, for the ops that have one.

The template is shared too: templates/shared/warp_specialized.py.j2.
"""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, ScheduleSpace
from nsagen.codegen.spaces.padding import raw_peak
from nsagen.core.releases import Releases
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

TILE_ROWS = 128
"""Query rows of a tile: 64 for each of two groups of four warps."""


GLUON = Releases((3, 6), (3, 9))
"""The releases whose Gluon, an experimental interface, the templates were written and run for."""


def supports(workload: Workload) -> bool:
    """16-bit heads of 64 or 128 whose group fills a tile's rows exactly."""
    group = int(workload.gqa_ratio)
    sizes = {int(workload.head_dim), int(workload.v_head_dim)}
    return (
        workload.dtype != "float32"
        and sizes <= {64, 128}
        and group <= 64
        and TILE_ROWS % group == 0
    )


def runs_on(target: Target) -> bool:
    """Warpgroup products exist only on Hopper."""
    return target.has_wgmma


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The tokens of a tile, and how exact the softmax has to be."""
    return {
        "tile_tokens": TILE_ROWS // int(workload.gqa_ratio),
        "raw_peak": raw_peak(workload),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tiles in flight, and 1 KiB for barriers and alignment."""
    dim, v_dim = int(workload.head_dim), int(workload.v_head_dim)
    queries = TILE_ROWS * dim
    keys = int(schedule.num_stages) * int(schedule.block_n) * (dim + v_dim)
    return 2 * (queries + keys) + 1024


def alone(workload: Workload) -> bool:
    """`supports`, where the forced blocks' result is not wanted too."""
    return not workload.named().get("local_blocks") and supports(workload)


def space(op: str, block_n: int, *, preferred: bool) -> ScheduleSpace:
    """The space of an op's forward pass.

    Args:
        block_n: keys per step when nothing was measured.
        preferred: whether to use the space at all in that case.
    """

    def default(workload: Workload, target: Target) -> dict[str, Param]:
        """Three steps in flight: a tenth faster than two on an H200, and four do not fit."""
        return {"block_n": block_n, "num_stages": 3}

    return ScheduleSpace(
        op=op,
        pass_="forward",
        algorithm="warp_specialized",
        knobs=(
            PowerOfTwo("block_n", 64, 128, "fewer steps against waste in masked ones"),
            Knob("num_stages", (2, 3, 4), "copies in flight against shared memory"),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
        supports=alone,
        runs_on=runs_on,
        triton=GLUON,
        preferred=lambda workload, target: preferred,
    )
