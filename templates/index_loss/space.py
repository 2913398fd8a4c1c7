"""The schedule spaces of the index's loss: forward and backward."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import LEAST_TILE, SCRATCH, element_bytes
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

LEAST_TOKENS = 16
"""Tokens of a step of the second backward pass: the shortest side of a matrix product."""


def elements_at_once(workload: Workload) -> int:
    """Elements of a head that are multiplied at once: all, unless queries take over 16 KiB."""
    group = max(LEAST_TILE, next_power_of_2(int(workload.gqa_ratio)))
    most = 16 * 1024 // (group * element_bytes(workload))
    return min(next_power_of_2(int(workload.head_dim)), most)


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes padded to powers of two, and whether ptxas may take all registers that it wants."""
    block_d, block_c = next_power_of_2(int(workload.head_dim)), elements_at_once(workload)
    block_di = next_power_of_2(int(workload.index_head_dim))
    padded = (block_d, block_di) != (workload.head_dim, workload.index_head_dim)
    return {
        "block_d": block_d,
        "block_c": block_c,
        "chunks": block_d // block_c,
        "block_di": block_di,
        "group_pad": max(LEAST_TILE, next_power_of_2(int(workload.gqa_ratio))),
        "free_registers": workload.dtype == "float32" or padded,
    }


def derive_backward(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The sizes of the forward pass, and those of a step of the second pass."""
    return {
        **derive(workload, schedule),
        "tokens": LEAST_TOKENS,
    }


def step_bytes(workload: Workload, keys: int) -> int:
    """Bytes of a step's keys and index keys."""
    widths = next_power_of_2(int(workload.head_dim)) + next_power_of_2(int(workload.index_head_dim))
    return element_bytes(workload) * keys * widths


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the steps in flight, and of a token's queries."""
    group = max(LEAST_TILE, next_power_of_2(int(workload.gqa_ratio)))
    queries = element_bytes(workload) * group * elements_at_once(workload)
    return int(schedule.num_stages) * step_bytes(workload, int(schedule.block_n)) + queries


def query_bytes(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the queries of a step of the second pass."""
    rows = LEAST_TOKENS * int(schedule.row_heads)
    return element_bytes(workload) * rows * next_power_of_2(int(workload.head_dim))


def shared_memory_backward(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the larger pass: the second keeps keys and a step's queries, and reshapes scores."""
    queries, keys = query_bytes(workload, schedule), int(schedule.key_tile)
    if workload.dtype != "float32":  # a copy in the layout of a matrix instruction
        queries *= 2
    scores = 4 * LEAST_TOKENS * int(schedule.row_heads) * keys
    second = step_bytes(workload, keys) + queries + scores
    return max(shared_memory(workload, schedule), second)


def scratch_backward(workload: Workload, schedule: Schedule, target: Target) -> int:
    """A copy of the queries for the other plain product, which AMD's GPUs keep in registers."""
    plain = workload.dtype == "float32" and target.backend == "cuda"
    return SCRATCH + (query_bytes(workload, schedule) if plain else 0)


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Short steps: a program has one token's heads."""
    widest, exact = max(workload.head_dim, workload.index_head_dim), workload.dtype == "float32"
    block_n = 16 if widest > 128 or exact else 32
    # Four warps keep operands of large plain products on the stack.
    warps = 8 if exact and widest > 64 and workload.gqa_ratio > LEAST_TILE else 4
    return {"block_n": block_n, "num_warps": warps, "num_stages": 2}


def default_backward(workload: Workload, target: Target) -> dict[str, Param]:
    """Key tiles that leave registers for the products of many rows."""
    wide = max(int(workload.head_dim), int(workload.index_head_dim)) > 128
    exact = workload.dtype == "float32"  # no matrix instruction is exact: plain FMA
    small = wide or exact or target.shared_memory < 128 * 1024
    widest = wide and (min(workload.head_dim, workload.index_head_dim) > 128 or exact)
    rows = min(next_power_of_2(int(workload.gqa_ratio)), 2 if widest else 4 if small else 16)
    knobs: dict[str, Param] = {"key_tile": 16 if small else 32, "key_warps": 8, "row_heads": rows}
    if wide:  # four warps spill
        knobs["num_warps"] = 8
    return {**default(workload, target), **knobs}


_KNOBS = (
    PowerOfTwo("block_n", 16, 128, "keys a step of a token: fewer steps against registers"),
    Knob("num_warps", (1, 2, 4, 8), "registers a thread against programs that fit"),
    Knob("num_stages", (1, 2, 3), "steps that are loading, against shared memory"),
)


def _whole_steps(workload: Workload, schedule: Schedule, target: Target) -> bool:
    return int(schedule.block_n) <= max(16, next_power_of_2(int(workload.block_size)))


_RULES = (Rule("a step must not be longer than a block", _whole_steps),)

SPACES = (
    ScheduleSpace(
        op="index_loss",
        pass_="forward",
        algorithm="query_major",
        knobs=_KNOBS,
        rules=_RULES,
        derive=derive,
        shared_memory=shared_memory,
        scratch=lambda workload, schedule, target: SCRATCH,
        default=default,
    ),
    ScheduleSpace(
        op="index_loss",
        pass_="backward",
        algorithm="two_passes",
        knobs=(
            *_KNOBS,
            PowerOfTwo("key_tile", 16, 64, "keys a program of the second pass"),
            Knob("key_warps", (4, 8), "threads for the same tile"),
            PowerOfTwo("row_heads", 1, 64, "heads of a token a product: fewer against registers"),
        ),
        rules=(
            *_RULES,
            Rule(
                "a product must not have more heads than a group",
                lambda w, s, t: int(s.row_heads) <= next_power_of_2(int(w.gqa_ratio)),
            ),
        ),
        derive=derive_backward,
        shared_memory=shared_memory_backward,
        scratch=scratch_backward,
        default=default_backward,
    ),
)
