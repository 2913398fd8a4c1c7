"""Selected attention: query t attends to the tokens u <= t of the blocks chosen for it.

Per key/value head, `topk_idx` names the blocks; the heads of a group share them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import (
    check_attention,
    check_chunk,
    check_cu_seqlens,
    check_like,
    check_topk_idx,
    fail,
)
from nsagen.ops._derive import Gradients, backward_of, op_of
from nsagen.ops._launch import attention_outputs, attention_sizes, key_of, scale_of
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
        o [N, HQ, Dv]; 0 where nothing is selected. Differentiable in q, k and v.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    scale = scale_of(softmax_scale, q)
    key = key_of(dispatcher)
    return selected_attention_forward(
        q, k, v, topk_idx, cu_seqlens, block_size, scale, key, cu_seqlens_k, q_start
    )[0]


def check_selected(call: Any) -> None:
    """The contract of `topk_sparse_attention`."""
    q, k, cu_seqlens = call.q, call.k, call.cu_seqlens
    check_attention(_OP, q, k, call.v)
    check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, q)
    if call.cu_seqlens_k is not None:
        check_cu_seqlens(_OP, "cu_seqlens_k", call.cu_seqlens_k, k)
        check_like(_OP, ("cu_seqlens", cu_seqlens), cu_seqlens_k=call.cu_seqlens_k)
    elif q.shape[0] != k.shape[0]:
        came = f"{q.shape[0]} and {k.shape[0]}"
        fail(_OP, "q and k must have the same tokens", came, "pack one, or pass cu_seqlens_k")
    check_chunk(_OP, cu_seqlens, call.cu_seqlens_k, call.q_start)
    check_topk_idx(_OP, q, k.shape[1], call.topk_idx)
    if call.block_size < 1:
        fail(_OP, "block_size must be positive", call.block_size, "64 or 128 are usual")


selected_attention_forward = op_of(
    "selected_attention_forward",
    reference.selected_attention,
    returns="o lse",
    allocate=attention_outputs,
    check=check_selected,
    kernel="selected_attention forward",
    sizes=attention_sizes,
    launch="q k v topk_idx cu_seqlens o lse softmax_scale",
    optional="cu_seqlens_k q_start",
    gradients=Gradients(
        "q k v",
        "do q k v topk_idx cu_seqlens o lse dq dk dv softmax_scale delta gate",
        more="delta gate",
        optional="cu_seqlens_k q_start",
    ),
)
"""(o [N, HQ, Dv], lse [N, HQ]); lse is natural and not differentiable."""

selected_attention_backward = backward_of(selected_attention_forward)
