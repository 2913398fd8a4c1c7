"""Sliding-window attention: query t attends to the tokens t - window_size < u <= t."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_packed, check_tensors, check_window
from nsagen.ops._derive import Gradients, backward_of, op_of
from nsagen.ops._launch import attention_outputs, key_of, scale_of
from nsagen.runtime import Dispatcher


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
        o [N, HQ, Dv]. Differentiable in q, k and v.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    scale = scale_of(softmax_scale, q)
    key = key_of(dispatcher)
    o, _ = sliding_window_attention_forward(
        q, k, v, cu_seqlens, window_size, scale, key, cu_seqlens_k, q_start
    )
    return o


sliding_window_attention_forward = op_of(
    "sliding_window_attention_forward",
    reference.sliding_window_attention_forward,
    returns="o lse",
    allocate=attention_outputs,
    check=(check_tensors, check_packed, check_window),
    kernel="sliding_window_attention forward",
    launch="q k v cu_seqlens o lse softmax_scale cu_seqlens_k? q_start?",
    gradients=Gradients(
        "q k v",
        "do q k v cu_seqlens o lse dq dk dv softmax_scale delta gate False cu_seqlens_k? q_start?",
        more="delta gate",
        adds="dq dk dv",
    ),
)
"""(o [N, HQ, Dv], lse [N, HQ]); lse is natural and not differentiable."""

sliding_window_attention_backward = backward_of(sliding_window_attention_forward)
add_sliding_window_gradients = backward_of(sliding_window_attention_forward, adds=True)
