"""The schedule spaces of compression's backward pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.compression import PRODUCTS, out_dim
from nsagen.codegen.spaces.padding import SCRATCH, element_bytes
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

BLOCK_PARTS = 16
"""Parts of the sums over windows that are added up at once."""


def block_d(workload: Workload) -> int:
    """Head size padded to a power of two."""
    return next_power_of_2(int(workload.head_dim))


def block_out(workload: Workload) -> int:
    """Elements of a row of dy padded to a power of two; at least 16, as products need."""
    return max(16, next_power_of_2(out_dim(workload)))


def elements(workload: Workload, rows: int, num_warps: int) -> float:
    """Elements of a tile of whole rows that a thread holds."""
    return rows * block_d(workload) / (32 * num_warps)


def has_dots(workload: Workload) -> bool:
    """Whether there are products of dy and x to sum: the gradient of pooling weights."""
    return workload.compress_type == "weightedpool"


def common(workload: Workload) -> dict[str, Any]:
    """What the templates of both algorithms derive from the workload alone."""
    return {
        "units": int(workload.kernel_size) // int(workload.kernel_stride),
        "sums": bool(workload.with_pe),
        "dots": has_dots(workload),
        "out_dim": out_dim(workload),
        "pad_out": block_out(workload) != out_dim(workload),
        "block_parts": BLOCK_PARTS,
    }


def derive_pool(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """How dw is cut into programs, and padded sizes."""
    tiles = int(workload.kernel_size) // int(schedule.block_j) if has_dots(workload) else 1
    padded = {"block_d": block_d(workload), "pad_d": block_d(workload) != workload.head_dim}
    return {**common(workload), **padded, "j_tiles": tiles}


def default_pool(workload: Workload, target: Target) -> dict[str, Param]:
    """Sums of 8 elements a thread, of one place: programs of a few places save loads of dy, but are
    too few. On an H200 up to three times as fast with one as with eight.

    There, with heads of 128 and gradients of both weights and pe, long parts of 64 elements a
    thread took 0.8 and 0.97 of that time; with those of weights alone, four places in two warps
    1.01 and 0.83.
    """
    dim, weighted = block_d(workload), has_dots(workload)
    knobs: dict[str, Param] = {
        "block_tokens": min(128, max(4, 4096 // dim)),
        "block_windows": max(4, 1024 // dim),
        "block_j": 1,
        "part_windows": 128,
        "num_warps": 4,
    }
    measured = target.has_wgmma and workload.head_dim == 128 and workload.dtype == "bfloat16"
    if measured and weighted and workload.with_pe:
        knobs |= {"block_windows": 64, "part_windows": 1024}
    elif measured and weighted and int(workload.kernel_size) % 4 == 0:
        knobs |= {"block_tokens": 16, "block_j": 4, "part_windows": 64, "num_warps": 2}
    return knobs


def tile_shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the larger tile, which changes its layout in float32."""
    rows = max(int(schedule.block_tokens), int(schedule.block_windows), BLOCK_PARTS)
    return 4 * rows * block_d(workload) + SCRATCH


POOL = ScheduleSpace(
    op="compress",
    pass_="backward",
    algorithm="pool",
    knobs=(
        PowerOfTwo("block_tokens", 4, 128, "tokens a program of dx: shared dy against programs"),
        PowerOfTwo("block_windows", 4, 64, "windows a step: loads in flight against registers"),
        Knob("block_j", (1, 2, 4, 8, 16), "places a program of dw: reads of dy, registers"),
        Knob("part_windows", (64, 128, 256, 512, 1024), "windows a part: programs, parts to add"),
        Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
    ),
    rules=(
        Rule(
            "block_j divides kernel_size; 1 without a gradient of w",
            lambda w, s, t: w.kernel_size % s.block_j == 0 if has_dots(w) else s.block_j == 1,
        ),
        Rule(
            "each thread holds 4 to 64 elements of a tile",
            lambda w, s, t: (
                4 <= elements(w, int(s.block_tokens), int(s.num_warps)) <= 64
                and elements(w, int(s.block_windows), int(s.num_warps)) >= 4
            ),
        ),
        Rule(
            "the sums take 128 registers a thread or fewer",
            lambda w, s, t: (
                (int(s.block_j) + 1) * elements(w, int(s.block_windows), int(s.num_warps)) <= 128
            ),
        ),
    ),
    derive=derive_pool,
    shared_memory=tile_shared_memory,
    default=default_pool,
    supports=lambda w: w.compress_type in ("avgpool", "weightedpool"),
)


def derive_matmul(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """How both products are cut into steps and tiles."""
    dim, columns = int(workload.head_dim), out_dim(workload)
    walked = {"block_k": columns, "block_n": dim, "block_rows": dim, "block_cols": columns}

    def tiles(knob: str) -> int:
        return -(-walked[knob] // int(getattr(schedule, knob)))

    def padded(knob: str) -> bool:
        return walked[knob] % int(getattr(schedule, knob)) != 0

    return {
        **common(workload),
        "block_out": block_out(workload),
        "j_tiles": 1,
        "slices": tiles("block_k"),
        "column_tiles": tiles("block_n"),
        "row_tiles": tiles("block_rows"),
        "col_tiles": tiles("block_cols"),
        "pad_k": padded("block_k"),
        "pad_n": padded("block_n"),
        "pad_rows": padded("block_rows"),
        "pad_cols": padded("block_cols"),
    }


def matmul_shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tiles in flight, or of the results, in the larger of the two products."""
    units, rows, cols = (int(getattr(schedule, f"block_{n}")) for n in ("units", "rows", "cols"))
    block_n = int(schedule.block_n)
    steps = max(
        int(schedule.block_k) * (units + block_n), int(schedule.block_windows) * (rows + cols)
    )
    in_flight = element_bytes(workload) * int(schedule.num_stages) * steps
    return max(in_flight, 4 * max(units * block_n, rows * cols)) + SCRATCH


def default_matmul(workload: Workload, target: Target) -> dict[str, Param]:
    """Tiles of one warpgroup and of all columns of up to 128."""
    wide, out = block_d(workload), block_out(workload)
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        tile = {"block_units": 32, "block_n": min(32, wide), "block_k": min(32, out)}
        tile |= {"block_rows": min(32, wide), "block_cols": min(32, out), "block_windows": 32}
        return {**tile, "max_parts": 4, "num_warps": 4, "num_stages": 2}
    tile = {"block_units": 64, "block_n": min(128, wide), "block_k": min(64, out)}
    tile |= {"block_rows": min(64, wide), "block_cols": min(128, out), "block_windows": 64}
    if target.has_wgmma and wide <= 128:  # as fast or faster for 2048 and 16384 tokens on an H200
        return {**tile, "block_units": 128, "max_parts": 1, "num_warps": 8, "num_stages": 3}
    return {**tile, "max_parts": 4, "num_warps": 4, "num_stages": 3}


MATMUL = ScheduleSpace(
    op="compress",
    pass_="backward",
    algorithm="matmul",
    knobs=(
        PowerOfTwo("block_units", 16, 256, "tokens a program of dx: reuse of w against programs"),
        PowerOfTwo("block_n", 16, 256, "columns a program of dx: reuse of dy against programs"),
        PowerOfTwo("block_k", 16, 128, "columns of dy a step: fewer steps against shared memory"),
        PowerOfTwo("block_rows", 16, 256, "rows of dw a program: reuse of dy against programs"),
        PowerOfTwo("block_cols", 16, 256, "columns of dw a program: reuse of x against programs"),
        PowerOfTwo("block_windows", 16, 128, "windows a step of dw: steps against shared memory"),
        PowerOfTwo("max_parts", 1, 16, "parts of dw: programs against what is added up"),
        Knob("num_warps", (2, 4, 8), "threads for the same tile"),
        Knob("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
    ),
    rules=(
        Rule(
            "no tile is wider than a padded token or, of dy's columns, than those",
            lambda w, s, t: (
                max(s.block_n, s.block_rows) <= block_d(w)
                and max(s.block_k, s.block_cols) <= block_out(w)
            ),
        ),
        Rule(
            "a warp has 16 x 16 results or more, a matrix instruction's tile",
            lambda w, s, t: (
                w.dtype == "float32"
                or min(s.block_units * s.block_n, s.block_rows * s.block_cols)
                >= min(16 * 16 * s.num_warps, block_d(w) * min(block_d(w), block_out(w)))
            ),
        ),
        Rule(
            "each accumulator takes 128 registers a thread or fewer",
            lambda w, s, t: (
                max(s.block_units * s.block_n, s.block_rows * s.block_cols)
                <= 128 * 32 * s.num_warps
            ),
        ),
    ),
    derive=derive_matmul,
    shared_memory=matmul_shared_memory,
    default=default_matmul,
    supports=lambda w: w.compress_type in PRODUCTS,
)


def derive_gates(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, and how dw is cut into programs."""
    dim = block_d(workload)
    return {
        "units": int(workload.kernel_size) // int(workload.kernel_stride),
        "block_d": dim,
        "pad_d": dim != int(workload.head_dim),
        "out_dim": int(workload.head_dim),
        "block_parts": BLOCK_PARTS,
        "j_tiles": int(workload.kernel_size) // int(schedule.block_j),
    }


def default_gates(workload: Workload, target: Target) -> dict[str, Param]:
    """As pooling, except for two sums of 8 elements a thread per place, of at most 2 places."""
    size = int(workload.kernel_size)
    return {
        "block_tokens": max(4, 2048 // block_d(workload)),
        "block_windows": max(4, 1024 // block_d(workload)),
        "block_j": 2 if size % 2 == 0 else 1,
        "part_windows": 256,
        "num_warps": 4,
    }


GATES = ScheduleSpace(
    op="compress",
    pass_="backward",
    algorithm="gates",
    knobs=(
        PowerOfTwo("block_tokens", 4, 128, "tokens a program of dx: shared dy against programs"),
        PowerOfTwo("block_windows", 4, 64, "windows a step: loads in flight against registers"),
        Knob("block_j", (1, 2, 4, 8), "places a program of dw: reads of dy, registers"),
        Knob("part_windows", (64, 128, 256, 512, 1024), "windows a part: programs, parts to add"),
        Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
    ),
    rules=(
        Rule("block_j divides kernel_size", lambda w, s, t: w.kernel_size % s.block_j == 0),
        Rule(
            "each thread holds 4 to 64 elements of a tile",
            lambda w, s, t: (
                4 <= elements(w, int(s.block_tokens), int(s.num_warps)) <= 64
                and elements(w, int(s.block_windows), int(s.num_warps)) >= 4
            ),
        ),
        Rule(
            "the sums take 128 registers a thread or fewer",
            lambda w, s, t: (
                2 * int(s.block_j) * elements(w, int(s.block_windows), int(s.num_warps)) <= 128
            ),
        ),
    ),
    derive=derive_gates,
    shared_memory=tile_shared_memory,
    default=default_gates,
    supports=lambda w: w.compress_type == "sigmoid_mul",
)

SPACES = (POOL, MATMUL, GATES)
