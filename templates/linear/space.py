"""The schedule space of a linear layer's decode pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Choice, PowerOfTwo, ScheduleSpace
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """How exact tl.dot has to be."""
    return {
        "dot_precision": ', input_precision="ieee"' if workload.dtype == "float32" else "",
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tiles on their way, at the number of rows that takes most.

    The launch gives up a stage above 16 rows, and doubles the tile above 32.
    """
    itemsize = 4 if workload.dtype == "float32" else 2
    block_n, stages = int(schedule.block_n), int(schedule.num_stages)
    fewer = max(2, stages - 1)
    most = max(
        (block_n + 16) * stages,
        (block_n + 32) * fewer,
        (2 * block_n + 64) * fewer,
    )
    return most * int(schedule.block_k) * itemsize


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Two warps that share no weights, and as many bytes on their way as fit twice in an SM.

    A warp's rows of the tile are its own, 16 each, so that shared memory is read once for the
    weights and once a warp for x: with 4 warps on the same tile that would take longer than
    the weights take to arrive.
    """
    if workload.dtype == "float32":  # no tensor cores: the products take registers
        return {"block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 3}
    block_k = 256 if target.shared_memory > 200 * 1024 else 128
    return {"block_n": 32, "block_k": block_k, "num_warps": 2, "num_stages": 4}


SPACES = (
    ScheduleSpace(
        op="linear",
        pass_="decode",
        algorithm="stream_weights",
        knobs=(
            PowerOfTwo("block_n", 16, 128, "rows of weights a program: reuse of x against balance"),
            PowerOfTwo("block_k", 32, 512, "elements a step: long accesses against shared memory"),
            Choice("num_warps", (1, 2, 4, 8), "threads for the same tile"),
            Choice("num_stages", (2, 3, 4, 5, 6), "steps that are loaded ahead"),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    ),
)
