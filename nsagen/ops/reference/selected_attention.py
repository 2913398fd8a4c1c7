"""Attention of each query to the tokens of its selected blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops.layout import positions_in_sequence
from nsagen.ops.reference._attend import Bounds, attend, packed_attention, scale_of, upcast
from nsagen.ops.reference._checks import check_heads, sequence_bounds
from nsagen.ops.reference.quantize import first_values


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


def forced_blocks(
    tokens: Tensor, *, block_size: int, init_blocks: int, local_blocks: int
) -> Tensor:
    """The blocks that are always taken, once each, then -1.

    Args:
        tokens: positions [...].

    Returns:
        int32 [..., init_blocks + local_blocks].
    """
    own = (tokens // block_size).unsqueeze(-1)
    first = torch.arange(init_blocks, device=tokens.device)
    local = own - torch.arange(local_blocks - 1, -1, -1, device=tokens.device)
    first = torch.where(first <= own, first, -1)
    local = torch.where(local >= init_blocks, local, -1)
    return torch.cat([first, local], -1).to(torch.int32)


def forced_blocks_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selected_attention` to the forced blocks alone: (o, lse)."""
    tokens = positions_in_sequence(cu_seqlens, q.shape[0], q_start)
    blocks = {"block_size": block_size, "init_blocks": init_blocks, "local_blocks": local_blocks}
    topk_idx = forced_blocks(tokens, **blocks).expand(k.shape[1], -1, -1)
    return selected_attention(
        *(q, k, v, topk_idx, cu_seqlens),
        block_size=block_size,
        softmax_scale=softmax_scale,
        cu_seqlens_k=cu_seqlens_k,
        q_start=q_start,
    )


def free_blocks_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    o_forced: Tensor,
    lse_forced: Tensor,
    *,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selected_attention`, from what attention to the forced blocks gave: (o, lse).

    Args:
        topk_idx: int32 [HK, N, topk], with the forced blocks among them.
        o_forced [N, HQ, Dv], lse_forced [N, HQ]: of the forced blocks alone.
    """
    own = (positions_in_sequence(cu_seqlens, q.shape[0], q_start) // block_size).unsqueeze(-1)
    forced = (topk_idx < init_blocks) | (topk_idx > own - local_blocks)
    free, (q_wide, k, v) = topk_idx.masked_fill(forced, -1), upcast(q, k, v)
    o, lse = selected_attention(
        *(q_wide, k, v, free, cu_seqlens),
        block_size=block_size,
        softmax_scale=softmax_scale,
        cu_seqlens_k=cu_seqlens_k,
        q_start=q_start,
    )
    total = torch.logaddexp(lse, lse_forced.to(lse.dtype))
    free_part, forced_part = (torch.exp(x - total).unsqueeze(-1) for x in (lse, lse_forced))
    return (o * free_part + o_forced * forced_part).to(q.dtype), total


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


@torch.no_grad()
def selected_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    topk_idx: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`selected_attention` of one new token a row, from caches.

    Args:
        q: [R, HQ, D], after rope.
        k_cache: [slots, max_length, HK, D], after rope, the new token's key among them.
        v_cache: [slots, max_length, HK, Dv].
        topk_idx: int32 [HK, R, topk], a set of blocks a row.
        positions: int32 [R], position of the new token; -1: an idle row, whose output is 0.
        slots: int32 [R], each row's place in the caches.
        block_size: tokens of a block.
        softmax_scale: 1/sqrt(D) unless given.
        block_table: int32 [slots, max_pages]: the caches are [pages, page_size, HK, dim].
        k_scale, v_scale: of the caches' rows, if these are of a narrow dtype; see `quantize`.

    Returns:
        o [R, HQ, Dv] in q's dtype.
    """
    check_heads("selected_attention decode", q, k_cache[0], v_cache[0])
    scale = scale_of(softmax_scale, q.shape[-1])
    o = q.new_zeros(*q.shape[:2], v_cache.shape[-1])
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        if position < 0:
            continue
        end, one = position + 1, slice(row, row + 1)
        chosen = selected_tokens(topk_idx[:, one], torch.arange(end, device=q.device), block_size)
        keys = first_values(k_cache, k_scale, block_table, slot, end)
        values = first_values(v_cache, v_scale, block_table, slot, end)
        query, keys, values = upcast(q[one], keys, values)
        out, _ = attend(query, keys, values, chosen, scale)
        o[one] = out.to(q.dtype)
    return o
