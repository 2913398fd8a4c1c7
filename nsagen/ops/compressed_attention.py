"""Compressed attention: query t attends to the windows i that end by it, i*s + l - 1 <= t.

`compressed_attention` also selects blocks by its probabilities; see `block_selection`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_attention, check_cu_seqlens, check_like, check_q_start
from nsagen.ops._gradients import reference_gradients
from nsagen.ops._launch import (
    key_of,
    launch,
    lse_dtype,
    no_chunk_backward,
    on_kernels,
    scale_of,
    with_contiguous_rows,
)
from nsagen.ops.block_selection import block_selection_forward
from nsagen.ops.reference._checks import check_windows
from nsagen.runtime import Dispatcher

_OP = "compressed_attention"


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
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to compressed keys, and the blocks that it makes each query select.

    Args:
        q: [N, HQ, D], after rope, as is k.
        k: [>= sum M, HK, D], compressed keys; rows past the last window are ignored.
        v: [>= sum M, HK, Dv].
        kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.
        block_size: tokens of a block; topk: blocks selected a token.
        cu_seqlens_q: int32 [batch + 1]; cu_seqlens_k: the same of the windows.
        max_seqlen_q, max_seqlen_k: not needed; accepted for callers that pass them.
        sm_scale: of the scores; 1/sqrt(D) by default.
        init_blocks: blocks at the start that are always selected.
        local_blocks: blocks up to a token's own that are always selected.
        q_start: int32 [batch], position of each sequence's first query, for a chunk of a longer
            prompt whose earlier windows are in k and v; 0 by default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [N, HQ, Dv], 0 where a query sees no window; differentiable in q, k and v, except for
        chunks. And topk_idx int32 [HK, N, topk]: ascending block indices, then -1.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scale = scale_of(sm_scale, q)
    key = key_of(dispatcher)
    o, lse = compressed_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride, scale, key, q_start
    )
    topk_idx = block_selection_forward(
        q.detach(),
        k.detach(),
        lse.detach(),
        cu_seqlens_q,
        cu_seqlens_k,
        kernel_size,
        kernel_stride,
        block_size,
        topk,
        init_blocks,
        local_blocks,
        scale,
        key,
        q_start,
    )
    return o, topk_idx


@torch.library.custom_op("nsagen::compressed_attention_forward", mutates_args=())
def compressed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
    dispatcher: str = "",
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [N, HQ, Dv], lse [N, HQ]); lse is natural and not differentiable."""
    check_attention(_OP, q, k, v)
    check_cu_seqlens(_OP, "cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens(_OP, "cu_seqlens_k", cu_seqlens_k, k, spare=True)
    check_like(_OP, ("cu_seqlens_q", cu_seqlens_q), cu_seqlens_k=cu_seqlens_k)
    check_windows(_OP, kernel_size, kernel_stride)
    check_q_start(_OP, cu_seqlens_q, q_start)
    if not on_kernels(q):
        return reference.compressed_attention_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            softmax_scale=softmax_scale,
            q_start=q_start,
        )
    o, lse = _allocate(q, v)
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], kernel_size, kernel_stride)
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, o, lse, softmax_scale)
    launch(dispatcher, _OP, "forward", values, args if q_start is None else (*args, q_start))
    return o, lse


@compressed_attention_forward.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
    dispatcher: str = "",
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _allocate(q, v)


@torch.library.custom_op("nsagen::compressed_attention_backward", mutates_args=())
def compressed_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    o: Tensor,
    lse: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); on a CPU by differentiating the reference."""
    if not on_kernels(q):

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.compressed_attention_forward(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                kernel_size=kernel_size,
                kernel_stride=kernel_stride,
                softmax_scale=softmax_scale,
            )[0]

        dq, dk, dv = reference_gradients(forward, (q, k, v), do)
        return dq, dk, dv
    if q.shape[0] == 0:  # nothing is launched, and k and v may have spare rows
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    gradients = _allocate_gradients(q, k, v)
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], kernel_size, kernel_stride)
    kept = (q, k, v, cu_seqlens_q, cu_seqlens_k, o, lse)
    args = (with_contiguous_rows(do), *kept, *gradients, softmax_scale)
    launch(dispatcher, _OP, "backward", values, args)
    return gradients


def add_compressed_gradient(
    dq: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lse: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
    dispatcher: str,
    delta: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add a gated branch's gradient to dq, in place, and return (dk, dv); by kernels alone.

    Args:
        do: of the gated sum; delta: do . o of each row, gate: what o was multiplied by before do
            came; both float32 [N, HQ].
    """
    if q.shape[0] == 0:
        return k.new_zeros(k.shape), v.new_zeros(v.shape)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], kernel_size, kernel_stride)
    kept = (q, k, v, cu_seqlens_q, cu_seqlens_k, None, lse)
    args = (with_contiguous_rows(do), *kept, dq, dk, dv, softmax_scale, delta, gate, True)
    launch(dispatcher, _OP, "backward", values, args)
    return dk, dv


@compressed_attention_backward.register_fake
def _fake_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    o: Tensor,
    lse: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(q, k, v)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, kernel_size, kernel_stride, softmax_scale, dispatcher, q_start = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)
    ctx.statics = (kernel_size, kernel_stride, softmax_scale, dispatcher)
    ctx.is_chunk = q_start is not None


def _backward(ctx, do: Tensor, dlse: Tensor):  # type: ignore[no-untyped-def]
    if ctx.is_chunk:
        raise no_chunk_backward(_OP)
    gradients = compressed_attention_backward(do, *ctx.saved_tensors, *ctx.statics)
    return (*gradients, None, None, None, None, None, None, None)


compressed_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _allocate(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return o, q.new_empty(q.shape[:2], dtype=lse_dtype(q))


def _allocate_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
