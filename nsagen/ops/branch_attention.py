"""The branches of whole sequences or chunks of them, and their gated sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.ops import forced_blocks
from nsagen.ops._launch import key_of, on_kernels
from nsagen.ops._op import define_op
from nsagen.ops.block_selection import select_blocks
from nsagen.ops.compressed_attention import compressed_attention_forward
from nsagen.ops.gated_attention import branches_forward
from nsagen.ops.gated_sum import gated_sum_forward
from nsagen.ops.selected_attention import selected_attention_forward
from nsagen.ops.sliding_window_attention import sliding_window_attention_forward
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
    assert windows is not None or not {"compressed", "selected"} & set(branches)
    ck, cv = windows or (None, None)
    (k, v), own, key = selected, sliding, key_of(dispatcher)
    k_window, v_window = (None, None) if own[0] is k and own[1] is v else own
    ends = (cu_seqlens, window_cu_seqlens)
    selection = (block_size, topk, init_blocks, local_blocks, window_size, softmax_scale)
    statics = (kernel_size, kernel_stride, *selection)
    inputs = [x for x in (q, k, v, ck, cv, gate) if x is not None]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if trains and len(branches) == len(BRANCHES) and k_window is None and on_kernels(q):
        assert ck is not None
        assert cv is not None
        more = (key, cu_seqlens_k, q_start)
        return branches_forward(q, k, v, ck, cv, gate, *ends, *statics, *more)[0]
    more = (gate, *ends, q_start, cu_seqlens_k, *statics, " ".join(branches), key)
    return attend(q, ck, cv, k, v, k_window, v_window, *more)


def _allocate(q: Tensor, v: Tensor, v_window: Tensor | None) -> Tensor:
    return q.new_empty((*q.shape[:2], (v if v_window is None else v_window).shape[2]))


@define_op(returns="o", allocate=_allocate)
def attend(
    q: Tensor,
    ck: Tensor | None,
    cv: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    gate: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    q_start: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
    softmax_scale: float,
    branches: str,
    dispatcher: str,
) -> Tensor:
    """`attend_branches` on tensors by themselves.

    Args:
        k_window, v_window: None where the sliding branch reads k and v.
        branches: names of those that are on, with blanks between.
    """
    on, last = branches.split(), (softmax_scale, dispatcher)
    tensors = [x for x in (q, ck, cv, k, v, k_window, v_window, gate) if x is not None]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    sums = len(on) == len(BRANCHES) and not trains  # in the last branch's kernel
    forced = (block_size, init_blocks, local_blocks)
    shared = k_window is None
    once = sums and shared and forced_blocks.applies(q, k, v, window_size, *forced, dispatcher)
    chunk = (cu_seqlens_k, q_start)
    outputs: dict[str, Tensor] = {}
    if ck is not None and cv is not None:
        windows = (cu_seqlens, window_cu_seqlens, kernel_size, kernel_stride)
        o, lse = compressed_attention_forward(q, ck, cv, *windows, *last, q_start)
        if "compressed" in on:
            outputs["compressed"] = o
        if "selected" in on:
            selection = (block_size, topk, init_blocks, local_blocks)
            topk_idx = select_blocks(q, ck, lse, *windows, *selection, *last, q_start)
            if once:
                o_window, _, o_forced, lse_forced = forced_blocks.window_and_forced_blocks(
                    q, k, v, cu_seqlens, window_size, *forced, *last, *chunk
                )
                others = (o_forced, lse_forced, o, o_window, gate)
                return forced_blocks.free_blocks_gated_sum(
                    q, k, v, topk_idx, cu_seqlens, *others, *forced, *last, *chunk
                )
            outputs["selected"], _ = selected_attention_forward(
                q, k, v, topk_idx, cu_seqlens, block_size, *last, *chunk
            )
    window = (q, k if k_window is None else k_window, v if v_window is None else v_window)
    more = (window_size, *last, *chunk)
    if sums:
        others = (outputs["compressed"], outputs["selected"])
        return sliding_window_gated_sum(*window, cu_seqlens, *others, gate, *more)
    if "sliding" in on:
        outputs["sliding"], _ = sliding_window_attention_forward(*window, cu_seqlens, *more)
    some = next(iter(outputs.values()))  # read, without weight, in place of one that is off
    compressed, of_blocks, of_window = (outputs.get(name, some) for name in BRANCHES)
    return gated_sum_forward(compressed, of_blocks, of_window, gate, dispatcher)
