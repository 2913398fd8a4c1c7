"""The schedule spaces of the index's dense loss: forward and backward."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import SCRATCH, element_bytes
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def padded(workload: Workload) -> tuple[int, int]:
    """Elements of a head and of an index head, as a tile has them."""
    sizes = int(workload.head_dim), int(workload.index_head_dim)
    return next_power_of_2(sizes[0]), next_power_of_2(sizes[1])


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, what float16 scales, and whether ptxas may take all registers that it wants."""
    block_d, block_di = padded(workload)
    exact = (block_d, block_di) == (workload.head_dim, workload.index_head_dim)
    return {
        "block_d": block_d,
        "block_di": block_di,
        # |s - p| is at most 1, and a probability of 1e-5 has few bits in float16.
        "slope_scale": 2**15 if workload.dtype == "float16" else 1,
        "free_registers": workload.dtype == "float32" or not exact,
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a tile of keys, of the queries in flight, of the index's tiles and of s - p."""
    dim, index_dim = padded(workload)
    tokens, keys = int(schedule.block_m), int(schedule.block_n)
    queries = int(schedule.num_stages) * tokens * dim
    after = tokens * index_dim + keys * tokens
    # Plain products free the queries before the index's come.
    both = max(queries, after) if workload.dtype == "float32" else queries + after
    return element_bytes(workload) * (keys * (dim + index_dim) + both)


def shared_memory_forward(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the larger kernel: the first has one tile of queries, and keys in flight."""
    rows = int(schedule.lse_tokens) + int(schedule.num_stages) * int(schedule.block_n)
    first = element_bytes(workload) * rows * max(padded(workload))
    return max(first, shared_memory(workload, schedule))


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Tiles whose sums stay in registers: the attention's, the index's and the gradient's."""
    widest = max(padded(workload))
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        few, warps = (32, 4) if widest <= 64 else (16, 8)
        return {"block_m": few, "block_n": few, "num_warps": warps, "num_stages": 1}
    if widest > 128:
        keys = 16 if target.backend == "hip" else 32
        return {"block_m": 32, "block_n": keys, "num_warps": 8, "num_stages": 2}
    warps = 4 if target.has_wgmma else 8  # a warp group has 64 rows
    return {"block_m": 64, "block_n": 64, "num_warps": warps, "num_stages": 2}


def default_forward(workload: Workload, target: Target) -> dict[str, Param]:
    """The same, and more rows where a program has nothing else to keep."""
    knobs = default(workload, target)
    wide = workload.dtype == "float32" or max(padded(workload)) > 128
    return {**knobs, "lse_tokens": knobs["block_m"] if wide else 128}


def default_backward(workload: Workload, target: Target) -> dict[str, Param]:
    return default(workload, target)


_KNOBS = (
    PowerOfTwo("block_m", 16, 128, "tokens a tile: reuse of keys against registers"),
    PowerOfTwo("block_n", 16, 128, "keys a tile: reuse of queries against registers"),
    Knob("num_warps", (2, 4, 8), "threads a tile against programs a multiprocessor"),
    Knob("num_stages", (1, 2, 3, 4), "heads whose queries are loading, against shared memory"),
)


def _fits(workload: Workload, schedule: Schedule, target: Target) -> bool:
    tile = int(schedule.block_m) * int(schedule.block_n)
    sums = max(int(schedule.block_m), int(schedule.block_n)) * padded(workload)[1]
    return 2 * tile + sums <= 6144 * int(schedule.num_warps)


_RULES = (Rule("sums must fit the registers: at most 192 a thread", _fits),)

SPACES = (
    ScheduleSpace(
        op="dense_index_loss",
        pass_="forward",
        algorithm="tiles",
        knobs=(*_KNOBS, PowerOfTwo("lse_tokens", 16, 256, "rows of the first kernel's programs")),
        rules=_RULES,
        derive=derive,
        shared_memory=shared_memory_forward,
        scratch=lambda workload, schedule, target: SCRATCH,
        default=default_forward,
    ),
    ScheduleSpace(
        op="dense_index_loss",
        pass_="backward",
        algorithm="keys",
        knobs=_KNOBS,
        rules=_RULES,
        derive=derive,
        shared_memory=shared_memory,
        scratch=lambda workload, schedule, target: SCRATCH,
        default=default_backward,
    ),
)
