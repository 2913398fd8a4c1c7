"""Selected attention: query t attends to the tokens u <= t of the blocks chosen for it.

Per key/value head, `topk_idx` names the blocks; the heads of a group share them.
"""

from __future__ import annotations

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_packed, check_tensors, check_topk_idx
from nsagen.ops._derive import Gradients, backward_of, op_of
from nsagen.ops._launch import attention_outputs, key_of, scale_of
from nsagen.runtime import Dispatcher


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


selected_attention_forward = op_of(
    "selected_attention_forward",
    reference.selected_attention,
    returns="o lse",
    allocate=attention_outputs,
    check=(check_tensors, check_packed, check_topk_idx),
    kernel="selected_attention forward",
    launch="q k v topk_idx cu_seqlens o lse softmax_scale cu_seqlens_k? q_start?",
    gradients=Gradients(
        "q k v",
        "do q k v topk_idx cu_seqlens o lse dq dk dv softmax_scale delta gate"
        " cu_seqlens_k? q_start?",
        more="delta gate",
    ),
)
"""(o [N, HQ, Dv], lse [N, HQ]); lse is natural and not differentiable."""

selected_attention_backward = backward_of(selected_attention_forward)
