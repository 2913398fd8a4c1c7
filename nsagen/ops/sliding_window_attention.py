"""Sliding-window attention: query t attends to the tokens t - window_size < u <= t."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_attention, check_cu_seqlens, check_indices, check_q_start, fail
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
from nsagen.runtime import Dispatcher

_OP = "sliding_window_attention"


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Attention of each query to the last `window_size` tokens, its own among them.

    For a chunk of a longer prompt: pass all keys so far, their offsets and where the chunk starts.

    Args:
        q: [N, HQ, D], after rope, as is k.
        k: [R, HK, D]; R is N unless cu_seqlens_k says otherwise.
        v: [R, HK, Dv].
        window_size: tokens that a query sees, itself among them.
        cu_seqlens: int32 [batch + 1].
        softmax_scale: of the scores; 1/sqrt(D) by default.
        cu_seqlens_k: int32 [batch + 1], offsets of the keys, where a sequence has more of them than
            queries; cu_seqlens by default.
        q_start: int32 [batch], position of each sequence's first query among its keys; 0 by
            default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [N, HQ, Dv]. Differentiable in q, k and v, except for chunks.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    scale = scale_of(softmax_scale, q)
    key = key_of(dispatcher)
    o, _ = sliding_window_attention_forward(
        q, k, v, cu_seqlens, window_size, scale, key, cu_seqlens_k, q_start
    )
    return o


@torch.library.custom_op("nsagen::sliding_window_attention_forward", mutates_args=())
def sliding_window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [N, HQ, Dv], lse [N, HQ]); lse is natural and not differentiable."""
    check_sliding_window(q, k, v, cu_seqlens, window_size, cu_seqlens_k, q_start)
    if not on_kernels(q):
        return reference.sliding_window_attention_forward(
            q,
            k,
            v,
            cu_seqlens,
            window_size=window_size,
            softmax_scale=softmax_scale,
            cu_seqlens_k=cu_seqlens_k,
            q_start=q_start,
        )
    o, lse = _allocate(q, v)
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], window_size)
    args = (q, k, v, cu_seqlens, o, lse, softmax_scale)
    chunk = () if cu_seqlens_k is None and q_start is None else (cu_seqlens_k, q_start)
    launch(dispatcher, _OP, "forward", values, args + chunk)
    return o, lse


def check_sliding_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    cu_seqlens_k: Tensor | None,
    q_start: Tensor | None,
) -> None:
    """The contract of `sliding_window_attention`."""
    check_attention(_OP, q, k, v)
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        came = f"{q.shape[0]} and {k.shape[0]}"
        fail(_OP, "q and k must have the same tokens", came, "pack one, or pass cu_seqlens_k")
    check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, q)
    check_q_start(_OP, cu_seqlens, q_start)
    if cu_seqlens_k is not None:
        check_indices(_OP, q, tuple(cu_seqlens.shape), cu_seqlens_k=cu_seqlens_k)
        check_cu_seqlens(_OP, "cu_seqlens_k", cu_seqlens_k, k)
    if window_size < 1:
        fail(_OP, "window_size must be positive", window_size, "1 is the token itself")


@sliding_window_attention_forward.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _allocate(q, v)


@torch.library.custom_op("nsagen::sliding_window_attention_backward", mutates_args=())
def sliding_window_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o: Tensor,
    lse: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); on a CPU by differentiating the reference."""
    if not on_kernels(q):

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.sliding_window_attention_forward(
                q, k, v, cu_seqlens, window_size=window_size, softmax_scale=softmax_scale
            )[0]

        dq, dk, dv = reference_gradients(forward, (q, k, v), do)
        return dq, dk, dv
    gradients = _allocate_gradients(q, k, v)
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], window_size)
    kept = (q, k, v, cu_seqlens, o, lse)
    args = (with_contiguous_rows(do), *kept, *gradients, softmax_scale)
    launch(dispatcher, _OP, "backward", values, args)
    return gradients


def add_sliding_window_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lse: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str,
    delta: Tensor,
    gate: Tensor,
) -> None:
    """Add a gated branch's gradients to (dq, dk, dv), in place; by kernels alone.

    Args:
        do: of the gated sum; delta: do . o of each row, gate: what o was multiplied by before do
            came; both float32 [N, HQ].
    """
    values = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1], window_size)
    kept = (q, k, v, cu_seqlens, None, lse)
    args = (with_contiguous_rows(do), *kept, *gradients, softmax_scale, delta, gate, True)
    launch(dispatcher, _OP, "backward", values, args)


@sliding_window_attention_backward.register_fake
def _fake_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o: Tensor,
    lse: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(q, k, v)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, window_size, softmax_scale, dispatcher, cu_seqlens_k, q_start = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)
    ctx.statics = (window_size, softmax_scale, dispatcher)
    ctx.is_chunk = cu_seqlens_k is not None or q_start is not None


def _backward(ctx, do: Tensor, dlse: Tensor):  # type: ignore[no-untyped-def]
    if ctx.is_chunk:
        raise no_chunk_backward(_OP)
    gradients = sliding_window_attention_backward(do, *ctx.saved_tensors, *ctx.statics)
    return (*gradients, None, None, None, None, None, None)


sliding_window_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _allocate(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return o, q.new_empty(q.shape[:2], dtype=lse_dtype(q))


def _allocate_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
