"""The contracts that the reference ops share, checked with errors that say what to do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from nsagen.core.errors import InvalidInputError


def check_windows(op: str, kernel_size: int, kernel_stride: int) -> None:
    """kernel_size must be a positive multiple of kernel_stride."""
    if kernel_size < 1 or kernel_stride < 1 or kernel_size % kernel_stride:
        raise InvalidInputError(
            f"{op}: kernel_size must be a positive multiple of kernel_stride; got "
            f"kernel_size={kernel_size}, kernel_stride={kernel_stride}; the stride divides the "
            f"size, not the other way round, e.g. kernel_size=32, kernel_stride=16"
        )


def check_heads(where: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Shapes of q [*, HQ, D], k [T, HK, D], v [T, HK, Dv]; returns HQ // HK."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 3 or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise InvalidInputError(
            f"{where}: q must be [N, HQ, D], k [T, HK, D] and v [T, HK, Dv]; got {shapes}; "
            f"pass packed tensors, tokens first"
        )
    query_heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or query_heads % kv_heads:
        raise InvalidInputError(
            f"{where}: query heads must be a multiple of key/value heads; got {shapes}; "
            f"give every key/value head the same number of query heads"
        )
    return query_heads // kv_heads


def sequence_bounds(
    where: str, cu_seqlens: Tensor, total: int, *, spare: bool = False
) -> list[tuple[int, int]]:
    """(start, end) of each packed sequence; one empty sequence where there is none.

    Args:
        where: the op, for errors.
        cu_seqlens: [batch + 1] offsets.
        total: rows of the packed tensor.
        spare: the tensor may have rows past the last sequence.
    """
    ends = cu_seqlens.tolist()
    fits = bool(ends) and (ends[-1] <= total if spare else ends[-1] == total)
    if not fits or ends[0] != 0 or any(a > b for a, b in itertools.pairwise(ends)):
        raise InvalidInputError(
            f"{where}: cu_seqlens must start at 0, never fall and end at the number of tokens, "
            f"{total}; got {ends}; pass the running sum of the sequence lengths, 0 first"
        )
    return list(itertools.pairwise(ends)) or [(0, 0)]


def first_positions(q_start: Tensor | None, bounds: Sequence[tuple[int, int]]) -> list[int]:
    """The position of each sequence's first query; bounds are those of `sequence_bounds`."""
    return [0] * len(bounds) if q_start is None else q_start.tolist() or [0]
