"""The schedule space of block selection."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import SCRATCH, element_bytes, multiplies_from_shared_memory
from nsagen.core.target import KNOWN_TARGETS, Target
from nsagen.core.workload import Param, Schedule, Workload

_MAX_WINDOWS = 256
_LEAST_COLUMNS = 16
"""The fewest columns of a matrix product; a single head of few tokens is padded to this."""
_COMPARED_A_THREAD = 40
"""Blocks of a segment, and twice those kept so far, of a default's tokens: more of them spill."""
RESIDENT_BYTES = 32 * 1024
"""Most bytes of float32 queries that stay in a program."""


def step_pad(workload: Workload) -> int:
    """Windows that start in a block, padded to a power of two."""
    return next_power_of_2(int(workload.block_size) // int(workload.kernel_stride))


def step_rows(workload: Workload, schedule: Schedule) -> int:
    """Rows of a step for each block in it: those of a block, or a part of them."""
    return min(step_pad(workload), int(schedule.windows))


def kept_rows(workload: Workload) -> int:
    """Rows of 32 that hold a token's blocks."""
    return next_power_of_2(-(-int(workload.topk) // 32))


def pieces(group: int, tokens: int, columns: int) -> list[dict[str, Any]]:
    """Split a group's heads into matrix products of powers of two, large ones first.

    A group of 12 becomes 8 + 4 heads rather than 16 with four of padding. The remainder after a
    smaller product is padded, because each further product also costs registers.
    """
    least, most = max(1, _LEAST_COLUMNS // tokens), columns // tokens
    found: list[dict[str, Any]] = []
    first = 0
    while first < group:
        left = group - first
        below = 1 << (left.bit_length() - 1)
        heads = max(least, min(most, next_power_of_2(left) if found else below))
        found.append({"first": first, "heads": heads, "padded": heads > left})
        first += heads
    return found


def group_of(workload: Workload) -> int:
    """Query heads of a selection, which sum their scores."""
    return 1 if workload.score_heads == "each" else int(workload.gqa_ratio)


def query_bytes(workload: Workload, schedule: Schedule) -> list[int]:
    """Bytes of the queries of each matrix product."""
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    tokens = int(schedule.tokens)
    heads = pieces(group_of(workload), tokens, int(schedule.columns))
    return [piece["heads"] * tokens * row for piece in heads]


def reloads(workload: Workload, schedule: Schedule) -> bool:
    """Whether a step loads its queries again: float32 ones of wide groups fit no small GPU."""
    return workload.dtype == "float32" and sum(query_bytes(workload, schedule)) > RESIDENT_BYTES


def fills_registers(workload: Workload) -> bool:
    """Whether plain products, in float32, have more queries than small tiles hold in registers."""
    many = int(workload.head_dim) > 64 or group_of(workload) > 16
    return workload.dtype == "float32" and many


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, windows and blocks in units of kernel_stride, and the heads' products."""
    dim, stride = int(workload.head_dim), int(workload.kernel_stride)
    step, width = int(workload.block_size) // stride, int(workload.kernel_size) // stride
    # The last window of a block starts at unit step - 1 and covers `width` units.
    spill = (step + width - 2) // step
    pad_d = next_power_of_2(dim) != dim
    return {
        "block_d": next_power_of_2(dim),
        "pad_d": pad_d,
        "pieces": pieces(group_of(workload), int(schedule.tokens), int(schedule.columns)),
        "reload": reloads(workload, schedule),
        "free_registers": fills_registers(workload) or pad_d or group_of(workload) > 16,
        "step": step,
        "step_pad": step_rows(workload, schedule),
        "parts": -(-step // step_rows(workload, schedule)),
        "width": width,
        "spill": spill,
        "kept_rows": kept_rows(workload),
        "unroll_planes": spill <= 3,
        "no_rival": "-1" if workload.score_norm == "softmax" else "NONE",
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tile's queries, the keys in flight, and one plane that changes its layout."""
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    windows = int(schedule.windows)
    of_products = query_bytes(workload, schedule)
    queries, ahead = sum(of_products), int(schedule.num_stages) - 1
    if reloads(workload, schedule):  # in each step: those of the steps ahead, or one after another
        queries = ahead * queries if ahead else max(of_products)
    plane = 4 * int(schedule.tokens) * (windows // step_rows(workload, schedule))
    return queries + row * int(schedule.num_stages) * windows + plane


def scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of the windows' sums, or of a segment's scores beyond a step, in two layouts.

    With one stage, the sums are where the step's keys were.
    """
    tokens, windows = int(schedule.tokens), int(schedule.windows)
    row = next_power_of_2(int(workload.head_dim)) * element_bytes(workload)
    step = row * int(schedule.num_stages) * windows
    scores = 4 * tokens * max(2 * int(schedule.segment), 32 * kept_rows(workload)) - step
    sums = 8 * tokens * windows if target.backend == "cuda" else 0
    if int(schedule.num_stages) == 1 and not multiplies_from_shared_memory(target):
        sums -= step
    return max(0, sums, scores) + SCRATCH


def splits_group(workload: Workload) -> bool:
    """Whether a group takes products of several sizes, whose queries leave few registers."""
    group, padded = group_of(workload), 128 < int(workload.head_dim) < 256
    return group > (16 if padded else 32) and group != next_power_of_2(group)


def shape_of(workload: Workload, target: Target) -> dict[str, Param]:
    """Tokens, and the knobs that fit registers with them: compiled for sm_80 to sm_120, gfx942."""
    group = group_of(workload)
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        tokens, warps = (8, 4) if group > 4 else (16, 8)
        if fills_registers(workload):  # with more columns in all, operands go through the stack
            columns = _LEAST_COLUMNS if int(workload.head_dim) > 128 else 2 * _LEAST_COLUMNS
            tokens = max(1, min(tokens, columns // next_power_of_2(group)))
        knobs = {"tokens": tokens, "columns": 32, "windows": 16, "segment": 256}
        if fills_registers(workload) and target.backend == "cuda":
            # With one stage, four warps or more columns, operands go through the stack.
            return {**knobs, "columns": 16, "num_warps": 8, "num_stages": 2}
        return {**knobs, "num_warps": warps}
    wide = int(workload.head_dim) > 128  # twice the addresses of keys in flight
    padded = wide and int(workload.head_dim) < 256
    # Four warps spill on Blackwell, on parts whose shared memory holds few tokens of a group, and
    # with products of several sizes.
    crowded = target.backend == "cuda" and target.shared_memory < 128 * 1024
    odd = group != next_power_of_2(group)
    spills = crowded or target.arch == "100" or (odd and target.backend == "cuda")
    if group > 32 or (group > 8 and (wide or spills)):
        tokens = 8 if group > 16 or wide or (odd and not crowded) else 16
        small = crowded or (wide and group > 32)
        if odd and group > 16:  # the columns of two products together
            tokens = min(tokens, (128 if small or padded else 256) // next_power_of_2(group))
        windows = 64
        if splits_group(workload):
            windows = 16 if wide else 32
        if wide and crowded:  # with 32, a heuristic of ptxas spills to fit a second program
            windows = 32 if group > 16 else 16 if target.arch == "120" else 64
        # With products of several sizes, long segments spill on sm_120 beside more than 32 blocks.
        segment = 128 if odd and target.arch == "120" and kept_rows(workload) > 1 else 256
        knobs = {"tokens": tokens, "columns": 256, "windows": windows, "segment": segment}
        return {**knobs, "num_warps": 8}
    if group > 8:
        tokens = 8 if group > 16 else 16
        narrow = int(workload.head_dim) <= 64
        knobs = {"tokens": tokens, "columns": 256, "windows": 64, "segment": 64 if narrow else 256}
        return {**knobs, "num_warps": 8 if narrow and target.arch == "80" else 4}
    if group > 4 and (target.arch in ("100", "120") or group < 8):
        return {"tokens": 16, "columns": 256, "windows": 64, "segment": 64, "num_warps": 8}
    small = int(workload.head_dim) <= 32
    if group > 2:  # with heads of 32, 32 tokens spill
        return {"tokens": 16 if small else 32, "columns": 256, "windows": 64, "segment": 64}
    tokens = 16 if small and target.backend == "hip" else 32
    windows = 64 if group == 1 and crowded and 64 < int(workload.head_dim) <= 128 else 128
    return {"tokens": tokens, "columns": 64, "windows": windows, "segment": 64, "num_warps": 8}


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Two programs per multiprocessor, which take turns, if a tile is small enough.

    While one multiplies, the other computes exponentials, sums or selects.
    """
    exact, step, wide = workload.dtype == "float32", step_pad(workload), workload.head_dim > 128
    stages = 1 if exact else 3
    knobs = {"num_warps": 4, "num_stages": stages, "programs": 2 * target.num_sms}
    knobs |= shape_of(workload, target)
    if not exact and step <= 128 and not splits_group(workload):
        knobs["windows"] = max(int(knobs["windows"]), step)
    least = int(knobs["num_stages"]) if exact else 1
    budget = target.shared_memory // 2 - 512  # each program takes 1 KiB more than it asks for
    while shared_memory(workload, Schedule.of("resident_scores", knobs)) > budget:
        stages, tokens = int(knobs["num_stages"]), int(knobs["tokens"])
        if stages > 2 or (tokens <= 8 and stages > least):
            knobs["num_stages"] = stages - 1
        elif tokens > 8:
            knobs["tokens"] = tokens // 2
        elif budget < target.shared_memory:  # then one program
            budget = target.shared_memory
        elif tokens > 1:
            knobs["tokens"] = tokens // 2
        elif int(knobs["windows"]) > 16:
            knobs["windows"] = int(knobs["windows"]) // 2
        else:
            break  # one token's heads are too many: the space's own check reports it
    if int(knobs["tokens"]) <= 8 and int(knobs["windows"]) == 128:  # too few tokens for this many
        # Blocks of more than 64 windows take eight warps. Beside wide keys they take half as many
        # windows at once, and sm_120 eight warps for all blocks.
        eight = step > 64 or (wide and target.arch == "120")
        knobs |= {"windows": 64 if wide or step <= 64 else 128, "num_warps": 8 if eight else 4}
    compared = 64 * kept_rows(workload) + int(knobs["segment"])
    most = _COMPARED_A_THREAD if kept_rows(workload) < 4 else _COMPARED_A_THREAD // 2
    while int(knobs["tokens"]) * compared > most * 32 * int(knobs["num_warps"]):
        knobs["tokens"] = int(knobs["tokens"]) // 2
    return knobs


SPACES = (
    ScheduleSpace(
        op="block_selection",
        pass_="forward",
        algorithm="resident_scores",
        knobs=(
            PowerOfTwo("tokens", 1, 128, "reuse of each key against shared memory"),
            PowerOfTwo("columns", 16, 256, "wide matrix products against registers"),
            PowerOfTwo("windows", 16, _MAX_WINDOWS, "fewer steps against registers"),
            PowerOfTwo("segment", 32, 1024, "selecting seldom against registers"),
            Knob(
                "programs",
                (4, *sorted({n * t.num_sms for t in KNOWN_TARGETS.values() for n in (1, 2, 3, 4)})),
                "a full GPU against the workspace",
            ),
            Knob("num_warps", (1, 2, 4, 8), "registers a thread against programs that fit"),
            Knob("num_stages", (1, 2, 3, 4), "loads in flight against shared memory"),
        ),
        rules=(
            Rule(
                "a segment is made of whole steps",
                lambda w, s, t: int(s.segment) * step_rows(w, s) >= int(s.windows),
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        scratch=scratch,
        default=default,
        # Raw products have a kernel of their own, where it covers them.
        preferred=lambda workload, target: workload.score_norm == "softmax",
    ),
)
