"""The schedule space of sliding-window attention that gives the forced blocks' result beside."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, ScheduleSpace
from nsagen.codegen.spaces import warp_specialized
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def supports(workload: Workload) -> bool:
    """The pipeline's shapes, where each token has a local block: its own, at least."""
    return bool(workload.local_blocks) and warp_specialized.supports(workload)


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Which keys there are beside those that are local and in the window.

    A token at place p of its block has (local_blocks - 1) B + p + 1 local keys.
    """
    window, block = int(workload.window_size), int(workload.block_size)
    local = int(workload.local_blocks) * block
    local_past_window = local > window
    return {
        **warp_specialized.derive(workload, schedule),
        "local_past_window": local_past_window,
        "window_past_local": window > local - block + 1,
        "others": local_past_window or int(workload.init_blocks) > 0,
    }


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """As the window alone."""
    return {"block_n": 64, "num_stages": 3}


SPACES = (
    ScheduleSpace(
        op="sliding_window_attention",
        pass_="forward",
        algorithm="forced_blocks",
        knobs=(
            PowerOfTwo("block_n", 64, 128, "fewer steps against waste in masked ones"),
            Knob("num_stages", (2, 3, 4), "copies in flight against shared memory"),
        ),
        derive=derive,
        shared_memory=warp_specialized.shared_memory,
        default=default,
        supports=supports,
        runs_on=warp_specialized.runs_on,
        triton=warp_specialized.GLUON,
    ),
)
