"""The whole block: compression, rope, the three branches and their gated sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES, branches_on
from nsagen.ops.layout import positions_in_sequence
from nsagen.ops.reference._attend import attend, scale_of, upcast
from nsagen.ops.reference._checks import check_heads
from nsagen.ops.reference.compress import Weight, compress_exactly
from nsagen.ops.reference.compressed_attention import compressed_attention
from nsagen.ops.reference.gated_sum import gated_sum
from nsagen.ops.reference.quantize import first_values
from nsagen.ops.reference.rope import rope_if_given
from nsagen.ops.reference.selected_attention import selected_tokens, topk_sparse_attention
from nsagen.ops.reference.sliding_window_attention import sliding_window_attention


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    window_size: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    w_k: Weight = None,
    w_v: Weight = None,
    pe: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    softmax_scale: float | None = None,
    branches: Sequence[str] = BRANCHES,
    v_compress_type: str | None = None,
    pe_v: Tensor | None = None,
    lengths: object = None,
) -> Tensor:
    """Gated sum of compressed, selected and sliding-window attention.

    Keys and values are compressed before rope; then q and k turn by their token's position and
    compressed key i by position i * kernel_stride.

    Args:
        q: [N, HQ, D], before rope.
        k: [N, HK, D], before rope.
        v: [N, HK, Dv].
        gate: [N, HQ, 3], after the sigmoid: compressed, selected, sliding.
        cu_seqlens: int32 [batch + 1].
        compress_type: one of `nsagen.core.workload.COMPRESS_TYPES`.
        w_k: weight that compresses the keys, as `pool_windows` takes it.
        w_v: weight that compresses the values.
        pe: [HK, l, D], added to the keys before compression, or None.
        cos: float32 [P, D // 2], or None for no rope.
        sin: float32 [P, D // 2], or None for no rope.
        softmax_scale: 1/sqrt(D) unless given.
        branches: those that are on; the gate's columns of the others are ignored, and a window
            of 0 turns the sliding one off.
        v_compress_type: of the values, where it is not compress_type.
        pe_v: [HK, l, Dv], added to the values before compression, or None.
        lengths: not needed; accepted for callers that pass them.

    Returns:
        o [N, HQ, Dv] in q's dtype.
    """
    on = branches_on("native_sparse_attention", branches, window_size)
    sizes, v_type = (kernel_size, kernel_stride), v_compress_type or compress_type
    ck, ck_cu_seqlens = compress_exactly(k, w_k, pe, cu_seqlens, compress_type, *sizes)
    cv, _ = compress_exactly(v, w_v, pe_v, cu_seqlens, v_type, *sizes)
    positions = positions_in_sequence(cu_seqlens, q.shape[0])
    windows = positions_in_sequence(ck_cu_seqlens, ck.shape[0])
    q, k = rope_if_given(q, cos, sin, positions), rope_if_given(k, cos, sin, positions)
    ck = rope_if_given(ck, cos, sin, windows * kernel_stride)
    o_compressed, topk_idx = compressed_attention(
        q,
        ck,
        cv,
        kernel_size,
        kernel_stride,
        block_size,
        topk,
        cu_seqlens,
        ck_cu_seqlens,
        sm_scale=softmax_scale,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    o_selected = topk_sparse_attention(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale)
    window = max(1, window_size)
    o_sliding = sliding_window_attention(q, k, v, window, cu_seqlens, softmax_scale)
    return gated_sum(o_compressed, o_selected, o_sliding, _gate_of(gate, on))


def _gate_of(gate: Tensor, on: Sequence[str]) -> Tensor:
    """The gate with zeros for the branches that are off, whatever it holds there."""
    off = torch.tensor([name not in on for name in BRANCHES], device=gate.device)
    return gate.masked_fill(off, 0.0)


@torch.no_grad()
def native_sparse_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    topk_idx: Tensor,
    positions: Tensor,
    slots: Tensor,
    o_compressed: Tensor,
    gate: Tensor,
    *,
    block_size: int,
    window_size: int,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    branches: Sequence[str] = BRANCHES,
    k_window_cache: Tensor | None = None,
    v_window_cache: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """One new token a row: selected and sliding-window attention, summed with the compressed one.

    Args:
        q: [R, HQ, D], after rope.
        k_cache: [slots, max_length, HK, D], after rope, the new token's key among them.
        v_cache: [slots, max_length, HK, Dv].
        topk_idx: int32 [HK, R, topk].
        positions: int32 [R], position of the new token; -1: an idle row, whose output is 0.
        slots: int32 [R], each row's place in the caches.
        o_compressed: [R, HQ, Dv].
        gate: [R, HQ, 3], after the sigmoid.
        block_size: tokens of a block.
        window_size: tokens that the sliding window sees, the new one among them.
        softmax_scale: 1/sqrt(D) unless given.
        block_table: int32 [slots, max_pages]: the caches are [pages, page_size, HK, dim].
        branches: those that are on; the gate's columns of the others are ignored, and a window
            of 0 turns the sliding one off.
        k_window_cache: like k_cache, the sliding branch's own; None: k_cache is its, too.
        v_window_cache: like v_cache.
        k_scale: float32, of k_cache's shape without the last dimension, if that is quantized;
            v_scale: of v_cache.

    Returns:
        o [R, HQ, Dv] in q's dtype.
    """
    check_heads("native_sparse_attention decode", q, k_cache[0], v_cache[0])
    gate = _gate_of(gate, branches_on("native_sparse_attention decode", branches, window_size))
    scale = scale_of(softmax_scale, q.shape[-1])
    caches = [(k_cache, k_scale), (v_cache, v_scale)]
    own = [(cache, None) for cache in (k_window_cache, v_window_cache) if cache is not None]
    caches += own or caches
    o = q.new_zeros(o_compressed.shape)
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        if position < 0:
            continue
        end, one = position + 1, slice(row, row + 1)
        tokens = torch.arange(end, device=q.device)
        chosen = selected_tokens(topk_idx[:, one], tokens, block_size)
        recent = (tokens > position - window_size).unsqueeze(0)
        keys, values, window_keys, window_values = (
            first_values(cache, scales, block_table, slot, end) for cache, scales in caches
        )
        query, keys, values, window_keys, window_values = upcast(
            q[one], keys, values, window_keys, window_values
        )
        selected, _ = attend(query, keys, values, chosen, scale)
        sliding, _ = attend(query, window_keys, window_values, recent, scale)
        o[one] = gated_sum(o_compressed[one], selected, sliding, gate[one]).to(q.dtype)
    return o
