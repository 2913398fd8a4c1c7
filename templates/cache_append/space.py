"""The schedule spaces of appending a token to the caches."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.spaces.compression import PRODUCTS
from nsagen.codegen.spaces.padding import SCRATCH, element_bytes
from nsagen.core.target import Target
from nsagen.core.workload import CACHE_DTYPES, Param, Schedule, Workload


def padded(workload: Workload) -> dict[str, Any]:
    """Sizes of heads, and those padded to powers of two."""
    half, v_dim = int(workload.head_dim) // 2, int(workload.v_head_dim)
    block_half, block_dv = next_power_of_2(half), next_power_of_2(v_dim)
    return {
        "cache_limit": CACHE_DTYPES.get(str(workload.cache_dtype), 0),
        "half": half,
        "block_half": block_half,
        "pad_half": block_half != half,
        "block_dv": block_dv,
        "pad_dv": block_dv != v_dim,
    }


def types_of(workload: Workload) -> dict[str, str]:
    """How keys and values are compressed."""
    return {"key": str(workload.compress_type), "value": str(workload.v_compress_type)}


def branches_of(workload: Workload) -> dict[str, Any]:
    """Which of keys and values pool, and which are products of one or two layers."""
    types = types_of(workload)
    return {
        "block_l": next_power_of_2(int(workload.kernel_size)),
        "pools": tuple(sorted({kind for kind in types.values() if kind not in PRODUCTS})),
        "key_pooled": types["key"] not in PRODUCTS,
        "value_pooled": types["value"] not in PRODUCTS,
        "products": any(kind in PRODUCTS for kind in types.values()),
        "mlps": tuple(side for side, kind in types.items() if kind == "mlp"),
        "product_sides": tuple(side for side, kind in types.items() if kind in PRODUCTS),
    }


def derive_pool(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes of heads and windows."""
    tiles = ("key_tiles", "value_tiles", "mlp_key_tiles", "mlp_value_tiles")
    return {**padded(workload), **branches_of(workload), **dict.fromkeys(tiles, 0)}


def derive_matmul(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes of heads, and how many programs share a head's columns."""
    tiles = {}
    for side, kind in types_of(workload).items():
        dim = int(workload.head_dim if side == "key" else workload.v_head_dim)
        first = int(workload.mlp_hidden) if kind == "mlp" else dim
        tiles[f"{side}_tiles"] = -(-first // schedule.columns) if kind in PRODUCTS else 0
        tiles[f"mlp_{side}_tiles"] = -(-dim // schedule.columns) if kind == "mlp" else 0
    return {
        **padded(workload),
        **branches_of(workload),
        **tiles,
        "block_d": next_power_of_2(int(workload.head_dim)),
        "block_h": max(16, min(128, next_power_of_2(int(workload.mlp_hidden or 1)))),
    }


def elements(workload: Workload, schedule: Schedule) -> float:
    """Elements of a tile of queries that a thread holds, of each half."""
    tile = int(schedule.block_heads) * next_power_of_2(int(workload.head_dim) // 2)
    return tile / (32 * int(schedule.num_warps))


def few_weighted_heads(workload: Workload) -> bool:
    """Large groups whose keys are pooled with weights, as they were measured."""
    measured = workload.dtype == "bfloat16" and not workload.cache_dtype
    return (
        measured
        and workload.compress_type == workload.v_compress_type == "weightedpool"
        and int(workload.head_dim) == int(workload.v_head_dim) == 128
        and int(workload.gqa_ratio) >= 8
    )


def least_heads(workload: Workload, num_warps: int) -> int:
    """The fewest heads that leave each thread of some warps an element per half."""
    return max(1, 32 * num_warps // next_power_of_2(int(workload.head_dim) // 2))


def query_heads(workload: Workload, num_warps: int) -> int:
    """Heads that give each thread of some warps a load of 16 bytes per half."""
    each = 4 if workload.dtype == "float32" else 8
    return max(1, 32 * num_warps * each // next_power_of_2(int(workload.head_dim) // 2))


def default_pool(workload: Workload, target: Target) -> dict[str, Param]:
    """Small programs, as most of a step's time is a launch.

    Few key/value heads with weights have few programs: with four warps, which take the queries of
    64 heads of 128, an H200 took 0.9 to 1.05 of the time.
    """
    if target.has_wgmma and few_weighted_heads(workload):
        return {"block_heads": 64, "num_warps": 4}
    if target.has_wgmma:
        num_warps = 1 if workload.compress_type == "avgpool" else 2  # which also load weights
        return {"block_heads": least_heads(workload, num_warps), "num_warps": num_warps}
    dim = next_power_of_2(max(int(workload.head_dim) // 2, int(workload.v_head_dim)))
    window = next_power_of_2(int(workload.kernel_size)) * dim
    num_warps = min(8, max(4, window // (32 * 32)))
    return {"block_heads": query_heads(workload, num_warps), "num_warps": num_warps}


def pool_shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a row a warp, which sums over a window's tokens across warps take."""
    wide = next_power_of_2(max(int(workload.head_dim), int(workload.v_head_dim)))
    return 4 * int(schedule.num_warps) * wide + SCRATCH


def default_matmul(workload: Workload, target: Target) -> dict[str, Param]:
    """16 columns: 64 programs share the weights of 4 heads of 128. Twice as many tokens and columns
    are up to twice as fast on an H200."""
    wide = next_power_of_2(max(int(workload.head_dim), int(workload.v_head_dim)))
    if target.has_wgmma and wide <= 128 and workload.dtype != "float32":
        tile = {"block_rows": 32, "columns": 32, "num_warps": 8, "num_stages": 5}
        return {"block_heads": query_heads(workload, 8), **tile}
    # Four warps spill there with values that are padded to more than keys.
    padding = next_power_of_2(int(workload.v_head_dim)) > next_power_of_2(int(workload.head_dim))
    crowded = padding and workload.dtype == "float32" and target.arch in ("80", "86", "89")
    num_warps = 8 if crowded else 4
    return {
        "block_heads": query_heads(workload, num_warps),
        "block_rows": 16,
        "columns": 16,
        "num_warps": num_warps,
        "num_stages": 3 if wide > 128 or workload.dtype == "float32" else 5,
    }


def matmul_shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the tokens and weights in flight."""
    width = element_bytes(workload)
    wide = next_power_of_2(max(int(workload.head_dim), int(workload.v_head_dim)))
    step = wide * (int(schedule.block_rows) + int(schedule.columns))
    if int(workload.kernel_size) <= 2:  # so short a loop is unrolled: keys' steps beside values'
        step *= 2
    sums = pool_shared_memory(workload, schedule)  # of a side that pools
    return max(width * int(schedule.num_stages) * step, sums) + SCRATCH


_BLOCK_HEADS = PowerOfTwo("block_heads", 1, 256, "query heads a program: loads against programs")
_TILE = Rule(
    "each thread holds 1 to 32 elements of a half of the queries",
    lambda w, s, t: 1 <= elements(w, s) <= 32,
)

POOL = ScheduleSpace(
    op="cache_append",
    pass_="decode",
    algorithm="pool",
    knobs=(_BLOCK_HEADS, Knob("num_warps", (1, 2, 4, 8, 16), "threads for the same tile")),
    rules=(_TILE, split_kv.CACHE_DTYPE),
    derive=derive_pool,
    shared_memory=pool_shared_memory,
    default=default_pool,
    supports=lambda w: not branches_of(w)["products"],
)

MATMUL = ScheduleSpace(
    op="cache_append",
    pass_="decode",
    algorithm="matmul",
    knobs=(
        _BLOCK_HEADS,
        PowerOfTwo("block_rows", 16, 64, "windows at once: reuse of weights against room"),
        PowerOfTwo("columns", 16, 64, "columns a program: long runs against programs"),
        Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
        Knob("num_stages", (1, 2, 3, 4, 5, 6, 8), "loads in flight against shared memory"),
    ),
    rules=(_TILE, split_kv.CACHE_DTYPE),
    derive=derive_matmul,
    shared_memory=matmul_shared_memory,
    default=default_matmul,
    supports=lambda w: branches_of(w)["products"],
)

SPACES = (POOL, MATMUL)
