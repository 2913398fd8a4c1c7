"""All three branches and their gated sum, with little memory while gradients are computed.

With o = sum_i g_i o_i, a branch's gradient do_i = g_i do is never made. For P_i = g_i p_i,

    dv = P_i^T do,  ds = p_i (do_i . v - do_i . o_i) = P_i (do . v - delta_i),  delta_i = do . o_i,

so a branch's backward pass takes do itself, g_i, and delta_i, which is the gate's gradient too. One
node of the graph does that: it first reads the branches' outputs, for delta, after which they are
free.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.ops._derive import Gradients, backward_of, called, op_like
from nsagen.ops._launch import attention_outputs, fixed_kernel, with_contiguous_rows
from nsagen.ops._op import define_op
from nsagen.ops.block_selection import allocate_blocks, block_selection_forward
from nsagen.ops.compressed_attention import add_compressed_gradient, compressed_attention_forward
from nsagen.ops.forced_blocks import selected_and_window
from nsagen.ops.gated_sum import gated_sum_forward
from nsagen.ops.selected_attention import selected_attention_backward
from nsagen.ops.sliding_window_attention import add_sliding_window_gradients

BRANCH_OUTPUTS = (
    "o o_compressed lse_compressed o_selected lse_selected o_sliding lse_sliding topk_idx"
)
"""What a forward pass returns: the gated sum, and what its gradients need."""

TAKEN = "do deltas lse_compressed lse_selected lse_sliding topk_idx"
"""What the attention's gradients take of these, after `branch_deltas`."""


def allocate_branches(q: Tensor, k: Tensor, v: Tensor, topk: int) -> tuple[Tensor, ...]:
    branches = (attention_outputs(q, v) for _ in BRANCHES)
    blocks = allocate_blocks(q, k, topk)
    return attention_outputs(q, v)[0], *itertools.chain(*branches), blocks


def _allocate_columns(gate: Tensor) -> tuple[Tensor, Tensor]:
    columns = gate.new_empty((6, *gate.shape[:2]), dtype=torch.float32)
    return columns, gate.new_empty(gate.shape)


@define_op(
    returns="deltas",
    allocate=lambda gate: gate.new_empty(gate.shape, dtype=torch.float32),
    kernel="gated_sum backward",
    launch="do o_compressed o_selected o_sliding gate None None None deltas",
    prepare={"do": lambda do: with_contiguous_rows(do)},
)
def branch_deltas(
    do: Tensor,
    o_compressed: Tensor,
    o_selected: Tensor,
    o_sliding: Tensor,
    gate: Tensor,
    dispatcher: str = "",
) -> Tensor:
    """do . o of each branch, [N, HQ, 3] float32. All that is made while branches are held, which is
    the peak of memory."""
    branches = (o_compressed, o_selected, o_sliding)
    return torch.stack([(do.float() * o).sum(-1) for o in branches], -1)


@define_op(
    returns="columns dgate",
    allocate=_allocate_columns,
    kernel=lambda gate: fixed_kernel("launch_columns", gate),
    launch="gate deltas columns dgate",
)
def branch_columns(gate: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [6, N, HQ] of gate and deltas, [N, HQ, 3] each; and the gradient of gate, which
    deltas are."""
    columns = [x.float() for x in (*gate.unbind(-1), *deltas.unbind(-1))]
    return torch.stack(columns), deltas.to(gate.dtype, copy=True)


@define_op(
    returns="o_compressed lse_compressed topk_idx",
    allocate=lambda q, ck, cv, topk: (*attention_outputs(q, cv), allocate_blocks(q, ck, topk)),
)
def windows_forward(
    q: Tensor,
    ck: Tensor,
    cv: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float,
    dispatcher: str = "",
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse) of the compressed branch, and the blocks that its scores choose."""
    windows = (cu_seqlens, window_cu_seqlens, kernel_size, kernel_stride)
    last, blocks = (softmax_scale, dispatcher), (block_size, topk, init_blocks, local_blocks)
    o, lse = compressed_attention_forward(q, ck, cv, *windows, *last, q_start)
    return o, lse, block_selection_forward(q, ck, lse, *windows, *blocks, *last, q_start)


@define_op(
    returns="dq dk dv",
    allocate=lambda q, k, v: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
def tokens_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    lse_selected: Tensor,
    lse_sliding: Tensor,
    columns: Tensor,
    block_size: int,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the selected branch and the sliding one, which adds its own to the other's.

    Args:
        do: gradient of the gated sum.
        columns: as `branch_columns` gives them.
    """
    _, of_selected, of_sliding, _, delta_selected, delta_sliding = columns
    more = (softmax_scale, dispatcher, cu_seqlens_k, q_start)
    dq, dk, dv = selected_attention_backward(
        *(do, q, k, v, topk_idx, cu_seqlens, None, lse_selected, block_size),
        *(*more, delta_selected, of_selected),
    )
    add_sliding_window_gradients(
        *(do, q, k, v, cu_seqlens, None, lse_sliding, dq, dk, dv, window_size),
        *(*more, delta_sliding, of_sliding),
    )
    return dq, dk, dv


def add_windows_gradient(
    do: Tensor,
    q: Tensor,
    ck: Tensor,
    cv: Tensor,
    cu_seqlens: Tensor,
    window_cu_seqlens: Tensor,
    lse: Tensor,
    dq: Tensor,
    columns: Tensor,
    *more: Any,
) -> tuple[Tensor, Tensor]:
    """(dck, dcv) by the compressed branch, which adds to dq what is its queries' own.

    Args:
        more: kernel_size, kernel_stride, softmax_scale, dispatcher and q_start.
        others: as in `tokens_backward`.
    """
    gate, _, _, delta, _, _ = columns
    tensors = (do, q, ck, cv, cu_seqlens, window_cu_seqlens, None, lse, dq)
    return add_compressed_gradient(*tensors, *more, delta, gate)


def _gradients(call: Any) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dck, dcv, dgate) from the gradient of the gated sum and delta of each branch."""
    columns, dgate = branch_columns(call.gate, call.deltas)
    dq, dk, dv = called(tokens_backward, call, columns=columns)
    windows = (call.cu_seqlens, call.window_cu_seqlens, call.lse_compressed, dq, columns)
    sizes = (call.kernel_size, call.kernel_stride, call.softmax_scale, call.dispatcher)
    dck, dcv = add_windows_gradient(
        call.do, call.q, call.ck, call.cv, *windows, *sizes, call.q_start
    )
    return dq, dk, dv, dck, dcv, dgate


def _branches_forward(call: Any) -> tuple[Tensor, ...]:
    o_compressed, lse_compressed, topk_idx = called(windows_forward, call)
    selected = called(selected_and_window, call, topk_idx=topk_idx)
    o_selected, _, o_sliding, _ = selected
    o = gated_sum_forward(o_compressed, o_selected, o_sliding, call.gate, call.dispatcher)
    return o, o_compressed, lse_compressed, *selected, topk_idx


branches_forward = op_like(
    "branches_forward",
    (windows_forward, selected_and_window, gated_sum_forward),
    _branches_forward,
    "q k v ck cv gate cu_seqlens window_cu_seqlens kernel_size kernel_stride block_size topk"
    " init_blocks local_blocks window_size softmax_scale dispatcher cu_seqlens_k q_start",
    returns=BRANCH_OUTPUTS,
    allocate=allocate_branches,
    gradients=Gradients("q k v ck cv gate", body=_gradients, takes=TAKEN, first=branch_deltas),
)
"""o, then (o, lse) of the compressed branch, the selected one and the sliding one, topk_idx."""

branches_backward = backward_of(branches_forward)
