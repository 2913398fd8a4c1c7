"""The schedule space of block selection."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Choice, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.target import Target
from nsagen.workload import Param, Schedule, Workload

_MAX_WINDOWS = 256
_LEAST_COLUMNS = 16
"""The fewest columns of a matrix product; a single head of few tokens is padded to them."""


def step_pad(workload: Workload) -> int:
    """Windows that start in a block, padded to a power of two."""
    return next_power_of_2(int(workload.block_size) // int(workload.kernel_stride))


def pieces(group: int, tokens: int, columns: int) -> list[dict[str, Any]]:
    """Split a group's heads into matrix products of powers of two, large ones first.

    A group of 7 becomes 4 + 2 + 1 heads rather than 8 of which one is padding.
    """
    least = max(1, _LEAST_COLUMNS // tokens)
    found, first = [], 0
    while first < group:
        left = group - first
        heads = max(least, min(columns // tokens, 1 << (left.bit_length() - 1)))
        found.append({"first": first, "heads": heads, "padded": heads > left})
        first += heads
    return found


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, windows and blocks in units of kernel_stride, and the heads' products."""
    dim, stride = int(workload.head_dim), int(workload.kernel_stride)
    step, width = int(workload.block_size) // stride, int(workload.kernel_size) // stride
    # The last window of a block starts at unit step - 1 and covers `width` units.
    spill = (step + width - 2) // step
    return {
        "block_d": next_power_of_2(dim),
        "pad_d": next_power_of_2(dim) != dim,
        "pieces": pieces(int(workload.gqa_ratio), int(schedule.tokens), int(schedule.columns)),
        "step": step,
        "step_pad": step_pad(workload),
        "width": width,
        "spill": spill,
        "kept_rows": next_power_of_2(-(-int(workload.topk) // 32)),
        "beyonds": "tl.static_range" if spill <= 3 else "range",
        "dot_precision": ', input_precision="ieee"' if workload.dtype == "float32" else "",
    }


def element_bytes(workload: Workload) -> int:
    return 4 if workload.dtype == "float32" else 2


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tile's queries and of the keys that are on their way."""
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    heads = pieces(int(workload.gqa_ratio), int(schedule.tokens), int(schedule.columns))
    queries = sum(piece["heads"] for piece in heads) * int(schedule.tokens)
    return row * (queries + int(schedule.num_stages) * int(schedule.windows))


def registers(workload: Workload, schedule: Schedule) -> int:
    """Registers a thread that the scores of one product and all lse take, or a segment's keys."""
    threads = 32 * int(schedule.num_warps)
    product = int(schedule.windows) * int(schedule.columns) // threads
    keys = int(schedule.segment) * int(schedule.tokens) // threads
    return max(product, keys)


def default(workload: Workload, target: Target) -> dict[str, Param]:
    return {
        "tokens": 16,
        "columns": 128,
        "windows": max(64, step_pad(workload)),
        "segment": 512,
        "programs": 2 * target.num_sms,
        "num_warps": 4,
        "num_stages": 3,
    }


SPACES = (
    ScheduleSpace(
        op="block_selection",
        pass_="forward",
        algorithm="resident_scores",
        knobs=(
            PowerOfTwo("tokens", 8, 128, "reuse of each key against shared memory"),
            PowerOfTwo("columns", 16, 256, "wide matrix products against registers"),
            PowerOfTwo("windows", 16, _MAX_WINDOWS, "fewer steps against registers"),
            PowerOfTwo("segment", 32, 1024, "selecting seldom against registers"),
            Choice(
                "programs",
                (3, *sorted({n * t for t in (108, 132, 148, 304) for n in (1, 2, 3, 4)})),
                "a full GPU against the workspace",
            ),
            Choice("num_warps", (1, 2, 4, 8), "registers a thread against programs that fit"),
            Choice("num_stages", (1, 2, 3, 4), "loads in flight against shared memory"),
        ),
        rules=(
            Rule(
                "a step must hold the windows of a block",
                lambda w, s, t: int(s.windows) >= step_pad(w),
            ),
            Rule(
                "a segment is made of whole steps",
                lambda w, s, t: int(s.segment) * step_pad(w) >= int(s.windows),
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        default=default,
        supports=lambda workload: step_pad(workload) <= _MAX_WINDOWS,
    ),
)
