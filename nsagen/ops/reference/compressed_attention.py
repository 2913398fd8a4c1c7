"""Attention of each query to the compressed windows that end at or before it."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops.reference._attend import Bounds, attend, packed_attention, scale_of, upcast
from nsagen.ops.reference._checks import check_heads, check_windows, sequence_bounds
from nsagen.ops.reference.block_selection import BlockRule, block_selection, blocks_of
from nsagen.ops.reference.quantize import first_values


def compressed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale q k^T) v over the windows i with i * s + l - 1 <= t.

    Args:
        q: [N, HQ, D], after rope.
        k: compressed keys [T, HK, D]; rows past cu_seqlens_k[-1] are not read.
        v: compressed values [T, HK, Dv].
        cu_seqlens_q: int32 [batch + 1].
        cu_seqlens_k: int32 [batch + 1], offsets of the compressed sequences.
        kernel_size: tokens of a window, l.
        kernel_stride: tokens between the starts of two windows, s.
        softmax_scale: 1/sqrt(D) unless given.
        q_start: int32 [batch], position of each sequence's first query; 0 unless given.

    Returns:
        o [N, HQ, Dv] in q's dtype and lse [N, HQ], natural logarithm. Where no window is visible:
        0 and -inf.
    """
    where = "compressed_attention"
    check_windows(where, kernel_size, kernel_stride)
    check_heads(where, q, k, v)

    def keys(first: int, end: int) -> Bounds:
        return 0, max(0, (end - kernel_size) // kernel_stride + 1)

    def visible(tokens: Tensor, windows: Tensor, *, rows: slice) -> Tensor:
        return windows * kernel_stride + kernel_size - 1 <= tokens.unsqueeze(-1)

    return packed_attention(
        q,
        k,
        v,
        sequence_bounds(where, cu_seqlens_q, q.shape[0]),
        sequence_bounds(where, cu_seqlens_k, k.shape[0], spare=True),
        keys=keys,
        visible=visible,
        scale=scale_of(softmax_scale, q.shape[-1]),
        q_start=q_start,
    )


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sm_scale: float | None = None,
    init_blocks: int = 1,
    local_blocks: int = 2,
    *,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compressed attention, and the blocks that its probabilities select.

    See `compressed_attention_forward` and `block_selection` for the shapes. `max_seqlen_q` and
    `max_seqlen_k` are accepted for compatibility and not needed.

    Returns:
        o [N, HQ, Dv] in q's dtype and topk_idx int32 [HK, N, topk].
    """
    o, lse = compressed_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        softmax_scale=sm_scale,
        q_start=q_start,
    )
    topk_idx = block_selection(
        q,
        k,
        lse.detach(),
        cu_seqlens_q,
        cu_seqlens_k,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        softmax_scale=sm_scale,
        q_start=q_start,
    )
    return o, topk_idx


@torch.no_grad()
def compressed_attention_decode(
    q: Tensor,
    ck_cache: Tensor,
    cv_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    ck_scale: Tensor | None = None,
    cv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compressed attention and block selection of one new token a row.

    Args:
        q: [R, HQ, D], after rope.
        ck_cache: [slots, max_windows, HK, D], compressed keys after rope.
        cv_cache: [slots, max_windows, HK, Dv], compressed values.
        positions: int32 [R], position of the new token; -1: an idle row.
        slots: int32 [R], each row's place in the caches.
        softmax_scale: 1/sqrt(D) unless given.
        block_table: int32 [slots, max_pages]: the caches are [pages, windows a page, HK, dim].
        ck_scale: float32, of ck_cache's shape without the last dimension, if that is quantized;
            cv_scale: of cv_cache.

    Returns:
        o [R, HQ, Dv] in q's dtype, 0 for idle rows and where no window is visible; topk_idx int32
        [HK, R, topk], -1 for idle rows.
    """
    rule = BlockRule(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    check_heads("compressed_attention decode", q, ck_cache[0], cv_cache[0])
    scale = scale_of(softmax_scale, q.shape[-1])
    o = q.new_zeros(*q.shape[:2], cv_cache.shape[-1])
    topk_idx = positions.new_full((ck_cache.shape[2], q.shape[0], topk), -1, dtype=torch.int32)
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        if position < 0:
            continue
        one, token = slice(row, row + 1), torch.full((1,), position, device=q.device)
        windows = max(0, (position + 1 - kernel_size) // kernel_stride + 1)
        keys = first_values(ck_cache, ck_scale, block_table, slot, windows)
        values = first_values(cv_cache, cv_scale, block_table, slot, windows)
        query, keys, values = upcast(q[one], keys, values)
        everything = torch.ones(1, windows, dtype=torch.bool, device=q.device)
        out, lse = attend(query, keys, values, everything, scale)
        o[one] = out.to(q.dtype)
        blocks = position // block_size + 1
        topk_idx[:, one] = blocks_of(query, keys, lse, token, blocks, scale, rule)
    return o, topk_idx
