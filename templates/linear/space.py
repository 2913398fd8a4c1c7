"""The schedule space of a linear layer's decode pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace
from nsagen.codegen.spaces.padding import element_bytes
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """How exact tl.dot has to be."""
    return {}


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tiles in flight, at the number of rows that takes most.

    The launch halves the step above 16 rows, and doubles the tile above 32.
    """
    width = element_bytes(workload)
    block_n, block_k = int(schedule.block_n), int(schedule.block_k)
    most = max((block_n + 16) * block_k, (2 * block_n + 64) * block_k // 2)
    return most * int(schedule.num_stages) * width


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """One warp and its 16 rows, long steps, and as many bytes in flight as fit thrice in an SM.

    Small programs balance the GPU: on an H200, streams of 16 rows by one warp were the fastest or
    within a hundredth of it for weights of 33 MB to 235 MB; larger tiles lost up to a tenth.
    """
    columns = 8 if target.backend == "cuda" else 16
    if workload.dtype == "float32":  # no tensor cores: the products take registers
        return {
            "block_n": 32,
            "block_k": 32,
            "columns": columns,
            "num_warps": 4,
            "num_stages": 3,
        }
    block_k = 512 if target.shared_memory > 200 * 1024 else 256
    return {
        "block_n": 16,
        "block_k": block_k,
        "columns": columns,
        "num_warps": 1,
        "num_stages": 4,
    }


SPACES = (
    ScheduleSpace(
        op="linear",
        pass_="decode",
        algorithm="stream_weights",
        knobs=(
            PowerOfTwo("block_n", 16, 128, "rows of weights a program: reuse of x against balance"),
            PowerOfTwo("block_k", 32, 512, "elements a step: long accesses against shared memory"),
            Knob("columns", (8, 16), "least rows of x in a product: room against instructions"),
            Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
            Knob("num_stages", (2, 3, 4, 5, 6), "steps that are loaded ahead"),
        ),
        rules=(
            Rule(
                "AMD's matrix instructions take 16 columns or more",
                lambda w, s, t: t.backend == "cuda" or s.columns >= 16,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
    ),
)
