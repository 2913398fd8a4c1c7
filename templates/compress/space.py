"""The schedule spaces of compression's forward pass."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.compression import PRODUCTS, out_dim
from nsagen.codegen.spaces.padding import SCRATCH, element_bytes
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def padded(workload: Workload) -> dict[str, Any]:
    """Head and kernel size padded to powers of two."""
    dim = int(workload.head_dim)
    block_d = next_power_of_2(dim)
    return {
        "out_dim": dim,
        "block_d": block_d,
        "pad_d": block_d != dim,
        "block_l": next_power_of_2(int(workload.kernel_size)),
    }


def units_of(workload: Workload) -> int:
    """Units of a window."""
    return int(workload.kernel_size) // int(workload.kernel_stride)


def places_of(workload: Workload) -> int:
    """Sums that a unit needs: one per place in a window, unless all places have equal weight."""
    return 1 if workload.compress_type == "avgpool" else units_of(workload)


def derive_pool(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, and the windows that lie within a tile of units."""
    units = units_of(workload)
    return {
        **padded(workload),
        "units": units,
        "windows": int(schedule.block_units) - units + 1,
        "places": places_of(workload),
    }


def elements(workload: Workload, rows: int, num_warps: int) -> float:
    """Elements of a tile that a thread holds."""
    return rows * next_power_of_2(int(workload.head_dim)) / (32 * num_warps)


def pool_supports(workload: Workload) -> bool:
    """Whether a few sums suffice, and shifting them is little work next to reading the tokens."""
    units, stride = units_of(workload), int(workload.kernel_stride)
    return workload.compress_type not in PRODUCTS and units <= min(8, max(1, stride))


def default_pool(workload: Workload, target: Target) -> dict[str, Param]:
    """Small tiles, for many programs, in which at least half of the units start a window."""
    gated = workload.compress_type == "sigmoid_mul"
    if target.has_wgmma and not gated:
        return default_warp(workload)
    units = max(least_rows(workload), 2 * next_power_of_2(units_of(workload)))
    sums = places_of(workload) * elements(workload, units, 4)
    unroll = default_unroll(int(workload.kernel_stride))
    if target.arch == "120" or (target.arch == "100" and gated):  # four tokens per step spill
        unroll = min(unroll, 2)
    return {
        "block_units": units,
        "unroll": unroll,
        "num_warps": 4 if sums <= 64 else 8,
    }


def default_warp(workload: Workload) -> dict[str, Param]:
    """A warp a program if it can hold the sums, and all tokens of a unit loading at a time.

    For 2048 and 16384 tokens on an H200, faster than four warps and short steps by a fifth. Weights
    without pe took, for heads of 128, 0.76 and 1.0 of a warp's time with two.
    """
    dim, stride = next_power_of_2(int(workload.head_dim)), int(workload.kernel_stride)
    units = max(4, 128 // dim, next_power_of_2(2 * (units_of(workload) - 1)))
    sums = places_of(workload) * units * dim
    lone = workload.compress_type == "weightedpool" and not workload.with_pe
    least = 2 if lone and workload.dtype == "bfloat16" and workload.head_dim == 128 else 1
    num_warps = next(n for n in (1, 2, 4, 8) if n >= least and (sums <= 64 * 32 * n or n == 8))
    loads = 8192 if dim == int(workload.head_dim) else 4096  # which masks make larger
    most = max(1, loads * num_warps // (units * dim))
    unroll = max(n for n in (1, 2, 4, 8, 16) if stride % n == 0 and n <= most)
    return {"block_units": units, "unroll": unroll, "num_warps": num_warps}


def default_reread(workload: Workload, target: Target) -> dict[str, Param]:
    """Small tiles, for many programs."""
    return {
        "block_windows": least_rows(workload),
        "unroll": default_unroll(int(workload.kernel_size)),
        "num_warps": 4,
    }


def least_rows(workload: Workload) -> int:
    """Rows that give each thread of 4 warps a load of 16 bytes per step; at least 16."""
    return max(16, 1024 // next_power_of_2(int(workload.head_dim)))


def default_unroll(tokens: int) -> int:
    """Steps of 4 tokens if these divide the tokens to walk."""
    return max(n for n in (1, 2, 4) if tokens % n == 0)


def tile_shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a tile of sums that changes its layout, in float32."""
    knobs = dict(schedule.knobs)
    rows = int(knobs.get("block_units") or knobs["block_windows"])
    return 4 * rows * next_power_of_2(int(workload.head_dim)) + SCRATCH


POOL = ScheduleSpace(
    op="compress",
    pass_="forward",
    algorithm="pool",
    knobs=(
        PowerOfTwo("block_units", 4, 64, "units a program: shared neighbours against programs"),
        Knob("unroll", (1, 2, 4, 8, 16), "tokens a step: loads in flight against registers"),
        Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
    ),
    rules=(
        Rule("unroll divides kernel_stride", lambda w, s, t: w.kernel_stride % s.unroll == 0),
        Rule(
            "half of a tile's units or more start a window within it",
            lambda w, s, t: s.block_units >= 2 * (units_of(w) - 1),
        ),
        Rule(
            "the sums take 128 registers a thread or fewer",
            lambda w, s, t: places_of(w) * elements(w, int(s.block_units), int(s.num_warps)) <= 128,
        ),
        Rule(
            "each thread holds 4 elements of a tile or more",
            lambda w, s, t: elements(w, int(s.block_units), int(s.num_warps)) >= 4,
        ),
    ),
    derive=derive_pool,
    shared_memory=tile_shared_memory,
    default=default_pool,
    supports=pool_supports,
)

REREAD = ScheduleSpace(
    op="compress",
    pass_="forward",
    algorithm="reread",
    knobs=(
        PowerOfTwo("block_windows", 4, 64, "windows a program: cached tokens against programs"),
        Knob("unroll", (1, 2, 4, 8, 16), "tokens a step: loads in flight against registers"),
        Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
    ),
    rules=(
        Rule("unroll divides kernel_size", lambda w, s, t: w.kernel_size % s.unroll == 0),
        Rule(
            "each thread holds 4 to 64 elements of a tile",
            lambda w, s, t: 4 <= elements(w, int(s.block_windows), int(s.num_warps)) <= 64,
        ),
    ),
    derive=lambda workload, schedule: padded(workload),
    shared_memory=tile_shared_memory,
    default=default_reread,
    supports=lambda w: w.compress_type not in PRODUCTS,
)


def derive_matmul(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """How the product is cut into slices and column tiles."""
    dim, columns = int(workload.head_dim), out_dim(workload)
    block_n, block_k = int(schedule.block_n), int(schedule.block_k)
    return {
        "out_dim": columns,
        "slices": -(-dim // block_k),
        "column_tiles": -(-columns // block_n),
        "pad_k": dim % block_k != 0,
        "pad_n": columns % block_n != 0,
    }


def matmul_shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tokens and weights in flight, or of the results that change their layout."""
    block_m, block_n = int(schedule.block_m), int(schedule.block_n)
    step = element_bytes(workload) * int(schedule.block_k) * (block_m + block_n)
    return max(int(schedule.num_stages) * step, 4 * block_m * block_n) + SCRATCH


def widest(workload: Workload) -> int:
    """The widest tile of columns: all of them, padded; at least 16, as products need."""
    return max(16, next_power_of_2(out_dim(workload)))


def default_matmul(workload: Workload, target: Target) -> dict[str, Param]:
    """All columns of up to 128, so that tokens are read once; one warpgroup's 64 windows."""
    deep, wide = next_power_of_2(int(workload.head_dim)), widest(workload)
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        tile = {"block_m": 32, "block_n": min(32, wide), "block_k": min(32, deep)}
        return {**tile, "num_warps": 4, "num_stages": 2}
    tile = {"block_m": 64, "block_n": min(128, wide), "block_k": min(64, deep)}
    return {**tile, "num_warps": 4, "num_stages": 5 if target.has_wgmma else 3}


MATMUL = ScheduleSpace(
    op="compress",
    pass_="forward",
    algorithm="matmul",
    knobs=(
        PowerOfTwo("block_m", 16, 256, "windows a program: reuse of w against programs"),
        PowerOfTwo("block_n", 16, 256, "columns a program: reuse of tokens against programs"),
        PowerOfTwo("block_k", 16, 128, "elements a step: fewer steps against shared memory"),
        Knob("num_warps", (2, 4, 8), "threads for the same tile"),
        Knob("num_stages", (1, 2, 3, 4, 5), "steps that are loading, against shared memory"),
    ),
    rules=(
        Rule(
            "block_n is not wider than the padded columns, nor block_k than a padded token",
            lambda w, s, t: (
                s.block_n <= widest(w) and s.block_k <= next_power_of_2(int(w.head_dim))
            ),
        ),
        Rule(
            "a warp has 16 x 16 results or more, a matrix instruction's tile",
            lambda w, s, t: w.dtype == "float32" or s.block_m * s.block_n >= 16 * 16 * s.num_warps,
        ),
        Rule(
            "the accumulator takes 128 registers a thread or fewer",
            lambda w, s, t: s.block_m * s.block_n <= 128 * 32 * s.num_warps,
        ),
    ),
    derive=derive_matmul,
    shared_memory=matmul_shared_memory,
    default=default_matmul,
    supports=lambda w: w.compress_type in PRODUCTS,
)

SPACES = (POOL, REREAD, MATMUL)
