"""Attention of each query to the tokens of its selected blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._attend import Bounds, packed_attention, scale_of
from nsagen.ops.reference._checks import check_heads, sequence_bounds


def selected_tokens(topk_idx: Tensor, keys: Tensor, block_size: int) -> Tensor:
    """Which keys lie in a selected block.

    Args:
        topk_idx: [HK, C, topk] block indices; a set: order and repeats do not matter, and
            entries that name no block of these keys are ignored.
        keys: [T] positions of the keys, from 0.
        block_size: tokens of a block.

    Returns:
        bool [HK, C, T].
    """
    blocks = -(-keys.shape[0] // block_size)
    outside = (topk_idx < 0) | (topk_idx >= blocks)
    chosen = torch.zeros(
        *topk_idx.shape[:-1], blocks + 1, dtype=torch.bool, device=topk_idx.device
    ).scatter_(-1, topk_idx.long().masked_fill(outside, blocks), True)
    return chosen[..., keys // block_size]


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale q k^T) v over the tokens u <= t whose block is selected.

    Args:
        q: [N, HQ, D], after rope.
        k: [T, HK, D], after rope.
        v: [T, HK, Dv].
        topk_idx: int32 [HK, N, topk], block indices within the sequence, in any order. They are
            a set: repeats count once; entries below 0 or past the last block are ignored.
        cu_seqlens: int32 [batch + 1].
        block_size: tokens of a block.
        softmax_scale: 1/sqrt(D) unless given.
        cu_seqlens_k: int32 [batch + 1] of the keys; as cu_seqlens unless given.
        q_start: int32 [batch], the position of each sequence's first query; 0 unless given.

    Returns:
        o [N, HQ, Dv] in q's dtype and lse [N, HQ], natural logarithm. Where nothing is selected:
        0 and -inf.
    """
    where = "selected_attention"
    check_heads(where, q, k, v)
    if topk_idx.ndim != 3 or topk_idx.shape[:2] != (k.shape[1], q.shape[0]):
        raise InvalidInputError(
            f"{where}: topk_idx must be [HK, N, topk] with HK={k.shape[1]} and N={q.shape[0]}; got "
            f"{tuple(topk_idx.shape)}; pass the indices of block selection, heads first"
        )
    bounds = sequence_bounds(where, cu_seqlens, q.shape[0])
    key_bounds = bounds
    if cu_seqlens_k is not None:
        key_bounds = sequence_bounds(where, cu_seqlens_k, k.shape[0])

    def keys(first: int, end: int) -> Bounds:
        return 0, end

    def visible(tokens: Tensor, keys: Tensor, *, rows: slice) -> Tensor:
        chosen = selected_tokens(topk_idx[:, rows], keys, block_size)
        return chosen & (keys <= tokens.unsqueeze(-1))

    scale = scale_of(softmax_scale, q.shape[-1])
    return packed_attention(
        q, k, v, bounds, key_bounds, keys=keys, visible=visible, scale=scale, q_start=q_start
    )


def topk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """`selected_attention` under its compatible name: o [N, HQ, Dv] alone."""
    o, _ = selected_attention(
        q,
        k,
        v,
        topk_idx,
        cu_seqlens,
        block_size=block_size,
        softmax_scale=softmax_scale,
        cu_seqlens_k=cu_seqlens_k,
        q_start=q_start,
    )
    return o
