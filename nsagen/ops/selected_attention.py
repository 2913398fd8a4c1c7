"""Selected attention: query t attends to the tokens u <= t of the blocks chosen for it.

Per key/value head, `topk_idx` names the blocks; the heads of a group share them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import (
    check_attention,
    check_cu_seqlens,
    check_like,
    check_q_start,
    check_topk_idx,
    fail,
)
from nsagen.ops._gradients import reference_gradients
from nsagen.ops._launch import key_of, launch, lse_dtype, on_kernels, scale_of
from nsagen.runtime import Dispatcher

_OP = "selected_attention"


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
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Attention of each query to the blocks of keys that were selected for it.

    q, k and v may have any strides of tokens and heads, 0 among them, and share memory; their last
    dimension is contiguous. Sequences may be of any length, 0 among them. On a CPU, and on a GPU
    where the variable NSAGEN_CHECK_VALUES is 1, offsets are checked before anything is computed.

    Args:
        q: [N, HQ, D], after rope, as is k.
        k: [T, HK, D].
        v: [T, HK, Dv].
        topk_idx: int32 [HK, N, topk], contiguous: block indices within the sequence. They are a
            set: any order, and a repeat counts once. An entry that names no block up to the
            query's own (-1 or any other number) is ignored, wherever it stands.
        block_size: tokens of a block.
        cu_seqlens: int32 [batch + 1].
        softmax_scale: of the scores; 1/sqrt(D) by default.
        cu_seqlens_k: int32 [batch + 1], of the keys of sequences that have more of them than
            queries; as cu_seqlens by default, and then T = N.
        q_start: int32 [batch], the position of each sequence's first query; 0 by default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [N, HQ, Dv]; 0 where nothing is selected. Differentiable in q, k and v, unless
        cu_seqlens_k or q_start is given.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    scale = scale_of(softmax_scale, q)
    key = key_of(dispatcher)
    return selected_attention_forward(
        q, k, v, topk_idx, cu_seqlens, block_size, scale, key, cu_seqlens_k, q_start
    )[0]


@torch.library.custom_op("nsagen::selected_attention_forward", mutates_args=())
def selected_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [N, HQ, Dv], lse [N, HQ]); lse is natural and not differentiable."""
    check_attention(_OP, q, k, v)
    check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, q)
    if cu_seqlens_k is not None:
        check_cu_seqlens(_OP, "cu_seqlens_k", cu_seqlens_k, k)
        check_like(_OP, ("cu_seqlens", cu_seqlens), cu_seqlens_k=cu_seqlens_k)
    elif q.shape[0] != k.shape[0]:
        came = f"{q.shape[0]} and {k.shape[0]}"
        fail(_OP, "q and k must have the same tokens", came, "pack one, or pass cu_seqlens_k")
    check_q_start(_OP, cu_seqlens, q_start)
    check_topk_idx(_OP, q, k.shape[1], topk_idx)
    if block_size < 1:
        fail(_OP, "block_size must be positive", block_size, "64 or 128 are usual")
    if not on_kernels(q):
        return reference.selected_attention(
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
    o, lse = _allocate(q, v)
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], block_size)
    args = (q, k, v, topk_idx, cu_seqlens, o, lse, softmax_scale)
    chunk = () if cu_seqlens_k is None and q_start is None else (cu_seqlens_k, q_start)
    launch(dispatcher, _OP, "forward", values, (*args, *chunk))
    return o, lse


@selected_attention_forward.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _allocate(q, v)


@torch.library.custom_op("nsagen::selected_attention_backward", mutates_args=())
def selected_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    o: Tensor | None,
    lse: Tensor,
    block_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    delta: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); without kernels by differentiating the reference.

    Kernels alone take these float32 [N, HQ]: delta, which is do . o of each row and stands for o
    where it is given, and gate, by which o was multiplied before do came.
    """
    if on_kernels(q):
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], block_size)
        args = (do, q, k, v, topk_idx, cu_seqlens, o, lse, dq, dk, dv, softmax_scale, delta, gate)
        launch(dispatcher, _OP, "backward", values, args)
        return dq, dk, dv

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        statics = {"block_size": block_size, "softmax_scale": softmax_scale}
        return reference.selected_attention(q, k, v, topk_idx, cu_seqlens, **statics)[0]

    dq, dk, dv = reference_gradients(forward, (q, k, v), do)
    return dq, dk, dv


@selected_attention_backward.register_fake
def _fake_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    o: Tensor | None,
    lse: Tensor,
    block_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    delta: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, block_size, softmax_scale, dispatcher, cu_seqlens_k, q_start = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)
    ctx.statics = (block_size, softmax_scale, dispatcher)
    ctx.of_chunk = cu_seqlens_k is not None or q_start is not None


def _backward(ctx, do: Tensor, dlse: Tensor):  # type: ignore[no-untyped-def]
    if ctx.of_chunk:
        rule = "gradients need every query of a sequence, from position 0"
        fail(_OP, rule, "cu_seqlens_k or q_start", "train on whole sequences")
    gradients = selected_attention_backward(do, *ctx.saved_tensors, *ctx.statics)
    return (*gradients, *(None,) * 7)


selected_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _allocate(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return o, q.new_empty(q.shape[:2], dtype=lse_dtype(q))
