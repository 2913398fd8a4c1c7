"""All three branches and their gated sum, kept to little memory while gradients are computed.

With o = sum_i g_i o_i, a branch's gradient do_i = g_i do is never made. For P_i = g_i p_i,

    dv = P_i^T do,  ds = p_i (do_i . v - do_i . o_i) = P_i (do . v - delta_i),  delta_i = do . o_i,

so a branch's backward pass takes do itself, g_i, and delta_i, which is the gate's gradient too. Two
nodes of the graph do that: the sum's reads the branches' outputs once, for delta, after which they
are free, and hands do and delta on to the attention's, in the places of their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops._launch import key_of, launch, scale_of, with_contiguous_rows
from nsagen.ops.block_selection import block_selection_forward
from nsagen.ops.compressed_attention import (
    add_compressed_gradient,
    compressed_attention_forward,
)
from nsagen.ops.gated_sum import gated_sum_forward
from nsagen.ops.selected_attention import (
    selected_attention_backward,
    selected_attention_forward,
)
from nsagen.ops.sliding_window_attention import (
    add_sliding_window_gradients,
    sliding_window_attention_forward,
)
from nsagen.runtime import Dispatcher


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ck: Tensor,
    cv: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    window_size: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """The gated sum of compressed, selected and sliding-window attention, by kernels.

    Args:
        q: [N, HQ, D]; k: [N, HK, D]; v: [N, HK, Dv]; q, k and ck after rope.
        ck: [>= sum M, HK, D]; cv: [>= sum M, HK, Dv]: those of the windows.
        gate: [N, HQ, 3], after the sigmoid: compressed, selected, sliding.
        cu_seqlens: int32 [batch + 1]; window_cu_seqlens: the same of the windows.
        kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.
        block_size: tokens of a block; topk: blocks selected a token, with init_blocks at the start
            and local_blocks up to its own always among them.
        window_size: tokens that the sliding window sees, the query's own among them.
        softmax_scale: of the scores; 1/sqrt(D) by default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [N, HQ, Dv]. Differentiable in q, k, v, ck, cv and gate.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    key = key_of(dispatcher)
    selection = (block_size, topk, init_blocks, local_blocks)
    statics = (kernel_size, kernel_stride, *selection, window_size, scale_of(softmax_scale, q), key)
    *outputs, _ = branches_forward(q, k, v, ck, cv, gate, cu_seqlens, window_cu_seqlens, *statics)
    return sum_branches(*outputs, gate, key)


@torch.library.custom_op("nsagen::branches_forward", mutates_args=())
def branches_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ck: Tensor,
    cv: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, lse of the compressed branch, of the selected one, of the sliding one, topk_idx).

    gate has no part in them, but in their gradients: see `branches_backward`.
    """
    windows = (cu_seqlens, window_cu_seqlens, kernel_size, kernel_stride)
    o_compressed, lse_compressed = compressed_attention_forward(
        q, ck, cv, *windows, softmax_scale, dispatcher
    )
    selection = (block_size, topk, init_blocks, local_blocks, softmax_scale, dispatcher)
    topk_idx = block_selection_forward(q, ck, lse_compressed, *windows, *selection)
    o_selected, lse_selected = selected_attention_forward(
        q, k, v, topk_idx, cu_seqlens, block_size, softmax_scale, dispatcher
    )
    o_sliding, lse_sliding = sliding_window_attention_forward(
        q, k, v, cu_seqlens, window_size, softmax_scale, dispatcher
    )
    selected, sliding = (o_selected, lse_selected), (o_sliding, lse_sliding)
    return o_compressed, lse_compressed, *selected, *sliding, topk_idx


@branches_forward.register_fake
def _fake_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ck: Tensor,
    cv: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def branch() -> tuple[Tensor, Tensor]:
        o = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
        return o, q.new_empty(q.shape[:2], dtype=torch.float32)

    topk_idx = q.new_empty((k.shape[1], q.shape[0], topk), dtype=torch.int32)
    return *branch(), *branch(), *branch(), topk_idx


@torch.library.custom_op("nsagen::branches_backward", mutates_args=())
def branches_backward(
    do: Tensor,
    deltas: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ck: Tensor,
    cv: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    lses: list[Tensor],
    topk_idx: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dck, dcv) from the gradient of the gated sum and delta of each branch.

    One branch after the other; the second and the third add theirs to what the first one wrote.
    """
    gates = [x.float().contiguous() for x in gate.unbind(-1)]
    deltas = [x.contiguous() for x in deltas]
    last = (softmax_scale, dispatcher)
    dq, dk, dv = selected_attention_backward(
        do, q, k, v, topk_idx, cu_seqlens, None, lses[1], block_size, *last, deltas[1], gates[1]
    )
    factors = (deltas[2], gates[2])
    add_sliding_window_gradients(
        (dq, dk, dv), do, q, k, v, cu_seqlens, lses[2], window_size, *last, *factors
    )
    windows = (cu_seqlens, window_cu_seqlens, lses[0], kernel_size, kernel_stride)
    factors = (deltas[0], gates[0])
    dck, dcv = add_compressed_gradient(dq, do, q, ck, cv, *windows, *last, *factors)
    return dq, dk, dv, dck, dcv


@branches_backward.register_fake
def _fake_branches_backward(
    do: Tensor,
    deltas: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ck: Tensor,
    cv: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    lses: list[Tensor],
    topk_idx: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dck, dcv = (x.new_empty(x.shape) for x in (q, k, v, ck, cv))
    return dq, dk, dv, dck, dcv


def _setup_branches(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, kernel_size, stride, block_size, _, _, _, window_size, scale, dispatcher = inputs
    *outputs, topk_idx = output
    ctx.mark_non_differentiable(topk_idx)
    ctx.save_for_backward(*tensors, *outputs[1::2], topk_idx)  # of the outputs lse alone
    ctx.statics = (kernel_size, stride, block_size, window_size, scale, dispatcher)


def _branches_backward(ctx, *gradients):  # type: ignore[no-untyped-def]
    """What `sum_branches` hands on: do in the place of each o's gradient, delta in each lse's."""
    *tensors, lse_compressed, lse_selected, lse_sliding, topk_idx = ctx.saved_tensors
    lses = [lse_compressed, lse_selected, lse_sliding]
    found = branches_backward(
        gradients[0], list(gradients[1:6:2]), *tensors, lses, topk_idx, *ctx.statics
    )
    return (*found, *(None,) * 12)


branches_forward.register_autograd(_branches_backward, setup_context=_setup_branches)


@torch.library.custom_op("nsagen::sum_branches", mutates_args=())
def sum_branches(
    o_compressed: Tensor,
    lse_compressed: Tensor,
    o_selected: Tensor,
    lse_selected: Tensor,
    o_sliding: Tensor,
    lse_sliding: Tensor,
    gate: Tensor,
    dispatcher: str = "",
) -> Tensor:
    """The gated sum of what `branches_forward` gives; the lse are there for their gradients."""
    return gated_sum_forward(o_compressed, o_selected, o_sliding, gate, dispatcher)


@sum_branches.register_fake
def _fake_sum(
    o_compressed: Tensor,
    lse_compressed: Tensor,
    o_selected: Tensor,
    lse_selected: Tensor,
    o_sliding: Tensor,
    lse_sliding: Tensor,
    gate: Tensor,
    dispatcher: str = "",
) -> Tensor:
    return o_compressed.new_empty(o_compressed.shape)


@torch.library.custom_op("nsagen::branch_deltas", mutates_args=())
def branch_deltas(
    do: Tensor,
    o_compressed: Tensor,
    o_selected: Tensor,
    o_sliding: Tensor,
    gate: Tensor,
    dispatcher: str = "",
) -> Tensor:
    """do . o of each branch, [N, HQ, 3] float32."""
    deltas = do.new_empty(gate.shape, dtype=torch.float32)
    args = (with_contiguous_rows(do), o_compressed, o_selected, o_sliding, gate)
    launch(dispatcher, "gated_sum", "backward", (do.shape[2],), (*args, None, None, None, deltas))
    return deltas


@branch_deltas.register_fake
def _fake_deltas(
    do: Tensor,
    o_compressed: Tensor,
    o_selected: Tensor,
    o_sliding: Tensor,
    gate: Tensor,
    dispatcher: str = "",
) -> Tensor:
    return do.new_empty(gate.shape, dtype=torch.float32)


def _setup_sum(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    o_compressed, _, o_selected, _, o_sliding, _, gate, dispatcher = inputs
    ctx.save_for_backward(o_compressed, o_selected, o_sliding, gate)
    ctx.dispatcher = dispatcher


def _sum_backward(ctx, do: Tensor):  # type: ignore[no-untyped-def]
    gate = ctx.saved_tensors[3]
    deltas = branch_deltas(do, *ctx.saved_tensors, ctx.dispatcher)
    # Views: copies would be made while the branches' outputs are still held, which is the peak.
    compressed, selected, sliding = deltas.unbind(-1)
    return do, compressed, do, selected, do, sliding, deltas.to(gate.dtype), None


sum_branches.register_autograd(_sum_backward, setup_context=_setup_sum)
