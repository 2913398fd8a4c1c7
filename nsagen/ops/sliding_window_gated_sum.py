"""Sliding-window attention that ends in the gated sum of the branches, where nothing is trained.

The kernel of the last branch adds the other two to what it has in registers: its own output is
neither written nor read again. A backward pass would need that output, and takes the separate ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops._checks import check_like, check_rows
from nsagen.ops._launch import launch, lse_dtype, on_kernels
from nsagen.ops.gated_sum import check_gate, gated_sum_forward
from nsagen.ops.sliding_window_attention import (
    check_sliding_window,
    sliding_window_attention_forward,
)

_OP = "sliding_window_attention"


@torch.library.custom_op("nsagen::sliding_window_gated_sum", mutates_args=())
def sliding_window_gated_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o_compressed: Tensor,
    o_selected: Tensor,
    gate: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """o [N, HQ, Dv]: `gated_sum` with what `sliding_window_attention` gives; no gradient.

    Args:
        o_compressed, o_selected: [N, HQ, Dv], the other branches.
        gate: [N, HQ, 3], after the sigmoid: compressed, selected, sliding.
        others: as in `sliding_window_attention`.
    """
    if not on_kernels(q):
        statics = (window_size, softmax_scale, dispatcher, cu_seqlens_k, q_start)
        o_sliding, _ = sliding_window_attention_forward(q, k, v, cu_seqlens, *statics)
        return gated_sum_forward(o_compressed, o_selected, o_sliding, gate, dispatcher)
    check_sliding_window(q, k, v, cu_seqlens, window_size, cu_seqlens_k, q_start)
    check_rows(_OP, v=v, o_compressed=o_compressed, o_selected=o_selected)
    o = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    check_like(_OP, ("o", o), o_compressed=o_compressed, o_selected=o_selected)
    check_gate(_OP, gate, o)
    lse = q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], window_size)
    others = (o_compressed.contiguous(), o_selected.contiguous(), gate.contiguous())
    args = (q, k, v, cu_seqlens, o, lse, softmax_scale, cu_seqlens_k, q_start, *others)
    launch(dispatcher, _OP, "forward", values, args)
    return o


@sliding_window_gated_sum.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o_compressed: Tensor,
    o_selected: Tensor,
    gate: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
