"""The branches of whole sequences or chunks of them, and their gated sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.ops._launch import key_of, on_kernels
from nsagen.ops.compressed_attention import compressed_attention, compressed_attention_forward
from nsagen.ops.gated_attention import gated_attention
from nsagen.ops.gated_sum import gated_sum
from nsagen.ops.selected_attention import topk_sparse_attention
from nsagen.ops.sliding_window_attention import sliding_window_attention
from nsagen.ops.sliding_window_gated_sum import sliding_window_gated_sum
from nsagen.runtime import Dispatcher

Pair = tuple[Tensor, Tensor]


def attend_branches(
    q: Tensor,
    windows: Pair | None,
    selected: Pair,
    sliding: Pair,
    gate: Tensor,
    *,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
    branches: Sequence[str],
    softmax_scale: float,
    q_start: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Attend in the branches that are on, and sum their outputs.

    Args:
        q: [N, HQ, D], after rope, as are all keys.
        windows: compressed keys [>= sum M, HK, D] and values [>= sum M, HK, Dv]; None where
            neither the compressed nor the selected branch is on.
        selected, sliding: keys [R, HK, D] and values [R, HK, Dv] of these branches.
        gate: [N, HQ, 3], after the sigmoid, 0 for branches that are off.
        cu_seqlens: int32 [batch + 1], of the queries; window_cu_seqlens: of the windows.
        branches: those that are on, one at least.
        q_start: int32 [batch], position of each sequence's first query; 0 by default.
        cu_seqlens_k: int32 [batch + 1], of keys where a sequence has more of them than queries.
        others: as in `native_sparse_attention`.

    Returns:
        o [N, HQ, Dv].
    """
    inputs = (q, *(windows or ()), *selected, *sliding, gate)
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    all_on = len(branches) == len(BRANCHES)
    shared = selected[0] is sliding[0] and selected[1] is sliding[1]
    is_chunk = q_start is not None or cu_seqlens_k is not None
    if wants_gradients and all_on and shared and not is_chunk and on_kernels(q):
        assert windows is not None
        return gated_attention(
            *(q, *selected, *windows, gate, cu_seqlens, window_cu_seqlens),
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            block_size=block_size,
            topk=topk,
            window_size=window_size,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
            softmax_scale=softmax_scale,
            dispatcher=dispatcher,
        )
    outputs: dict[str, Tensor] = {}
    if "selected" in branches:
        assert windows is not None
        o_compressed, topk_idx = compressed_attention(
            *(q, *windows, kernel_size, kernel_stride, block_size, topk),
            *(cu_seqlens, window_cu_seqlens),
            sm_scale=softmax_scale,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
            q_start=q_start,
            dispatcher=dispatcher,
        )
        if "compressed" in branches:
            outputs["compressed"] = o_compressed
        outputs["selected"] = topk_sparse_attention(
            *(q, *selected, topk_idx, block_size, cu_seqlens, softmax_scale),
            cu_seqlens_k=cu_seqlens_k,
            q_start=q_start,
            dispatcher=dispatcher,
        )
    elif "compressed" in branches:
        assert windows is not None
        sizes = (kernel_size, kernel_stride, softmax_scale, key_of(dispatcher))
        rows = (cu_seqlens, window_cu_seqlens)
        o, _ = compressed_attention_forward(q, *windows, *rows, *sizes, q_start)
        outputs["compressed"] = o
    if all_on and not wants_gradients:
        return sliding_window_gated_sum(
            *(q, *sliding, cu_seqlens, *outputs.values(), gate, window_size, softmax_scale),
            *(key_of(dispatcher), cu_seqlens_k, q_start),
        )
    if "sliding" in branches:
        outputs["sliding"] = sliding_window_attention(
            *(q, *sliding, window_size, cu_seqlens, softmax_scale),
            cu_seqlens_k=cu_seqlens_k,
            q_start=q_start,
            dispatcher=dispatcher,
        )
    some = next(iter(outputs.values()))  # read, without weight, in place of one that is off
    compressed, of_blocks, of_window = (outputs.get(name, some) for name in BRANCHES)
    return gated_sum(compressed, of_blocks, of_window, gate, dispatcher=dispatcher)
