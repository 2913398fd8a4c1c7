"""Arithmetic that the schedule spaces share."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import next_power_of_2
from nsagen.core.target import Target
from nsagen.core.workload import Schedule, Workload

LEAST_TILE = 16
"""The shortest side of a tile that tl.dot multiplies."""


SCRATCH = 1024
"""Bytes of shared memory that reductions, barriers and alignment take at most."""


def few_bytes(workload: Workload, schedule: Schedule, target: Target) -> int:
    """The scratch of kernels that convert no tile."""
    return 0 if target.backend == "hip" else SCRATCH


def multiplies_from_shared_memory(target: Target) -> bool:
    """Whether products take their left operand, too, from shared memory, on some paths."""
    return target.has_wgmma or target.arch == "100"


def element_bytes(workload: Workload) -> int:
    """Bytes of one element of the workload's dtype."""
    return 4 if workload.dtype == "float32" else 2


def buffers(workload: Workload, num_stages: int) -> int:
    """Steps whose tiles lie in shared memory at a time.

    Plain products take their operands as soon as they have arrived, so one buffer fewer than
    num_stages is enough.
    """
    return max(1, num_stages - 1) if workload.dtype == "float32" else num_stages


def plain_keys(rows: int, keys: int, widest: int) -> int:
    """The most keys, at most `keys`, whose scores eight warps multiply without the stack.

    A thread of a plain product has a square of scores, 4 x 4, 2 x 2 or one, and keeps its rows of
    queries, `widest` registers each, through the loop.
    """

    def held(keys: int) -> int:
        scores = rows * keys // 256
        return widest * (4 if scores >= 16 else 2 if scores >= 4 else 1)

    while keys > LEAST_TILE and held(keys) > max(128, widest):
        keys //= 2
    return keys


def raw_peak(workload: Workload) -> bool:
    """Whether a softmax keeps its peak before the scale: p = exp2((s - peak) scale).

    exp2(s scale - peak) saves one instruction a score. But a GPU fuses its product with the
    subtraction, so the largest score's exponent is the rounding error of peak = s scale. At scores
    of 1e4 1e4 D that is up to 64 for heads of 128, which float16 cannot hold, and twice as much
    for wider heads, which is past float32.
    """
    return workload.dtype == "float16" or int(workload.head_dim) > 128


def ds_scale(workload: Workload) -> float:
    """What float16 multiplies ds by before a product takes it: 2 / Dv, Dv padded to a power of two.

    ds = p (do . v - do . o) is at most p (1 - p) times the largest do . (v - v'), so at most
    Dv / 2 max|do| max|v|, which float16 cannot hold where the loss is scaled. Of 2 / Dv times that,
    max|do| max|v| is left; a power of two rounds nothing. Other dtypes have the range: 1.
    """
    return 2 / padded_heads(workload)["block_dv"] if workload.dtype == "float16" else 1


def group_tile(workload: Workload) -> tuple[int, int]:
    """(query heads of a group that one program takes, padded, and the programs of a group).

    All heads, unless their queries and other rows per head take more than 32 KiB.
    """
    group, sizes = int(workload.gqa_ratio), padded_heads(workload)
    padded = max(LEAST_TILE, next_power_of_2(group))
    row_bytes = element_bytes(workload) * (sizes["block_d"] + sizes["block_dv"])
    tile = padded
    while tile > LEAST_TILE and tile * row_bytes > 32 * 1024:
        tile //= 2
    return tile, -(-group // tile)


def padded_heads(workload: Workload) -> dict[str, Any]:
    """Head sizes padded to powers of two."""
    dim, v_dim = int(workload.head_dim), int(workload.v_head_dim)
    block_d, block_dv = next_power_of_2(dim), next_power_of_2(v_dim)
    return {
        "block_d": block_d,
        "block_dv": block_dv,
        "pad_d": block_d != dim,
        "pad_dv": block_dv != v_dim,
    }
