"""The schedule space of pooling new windows of a cache's keys."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.spaces.padding import SCRATCH
from nsagen.core.target import Target
from nsagen.core.workload import CACHE_DTYPES, Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The padded head size, and the tokens that a step reads."""
    return {
        "block_d": next_power_of_2(int(workload.head_dim)),
        "cache_limit": CACHE_DTYPES.get(str(workload.cache_dtype), 0),
        "block_t": min(int(schedule.step_tokens), next_power_of_2(int(workload.kernel_size))),
    }


def scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of a mean's parts, which warps exchange."""
    return SCRATCH + 4 * int(schedule.num_warps) * next_power_of_2(int(workload.head_dim))


SPACES = (
    ScheduleSpace(
        op="pool_append",
        pass_="decode",
        algorithm="windows",
        knobs=(
            PowerOfTwo("step_tokens", 8, 128, "tokens a step: latency hidden against registers"),
            Knob("num_warps", (1, 2, 4), "registers a thread against programs that fit"),
        ),
        rules=(split_kv.CACHE_DTYPE,),
        derive=derive,
        scratch=scratch,
        default=lambda workload, target: {"step_tokens": 32, "num_warps": 2},
    ),
)
