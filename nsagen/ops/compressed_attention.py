"""Compressed attention: query t attends to the windows i that end by it, i*s + l - 1 <= t.

`compressed_attention` also selects blocks by its probabilities; see `block_selection`.
"""

from __future__ import annotations

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_tensors, check_windowed
from nsagen.ops._derive import Gradients, backward_of, op_of
from nsagen.ops._launch import attention_outputs, key_of, scale_of
from nsagen.ops.block_selection import select_blocks
from nsagen.runtime import Dispatcher


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
        o [N, HQ, Dv], 0 where a query sees no window; differentiable in q, k and v. And topk_idx
        int32 [HK, N, topk]: ascending block indices, then -1.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scale = scale_of(sm_scale, q)
    more = (scale, key_of(dispatcher), q_start)
    windows = (cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride)
    o, lse = compressed_attention_forward(q, k, v, *windows, *more)
    blocks = (block_size, topk, init_blocks, local_blocks)
    topk_idx = select_blocks(q, k, lse, *windows, *blocks, *more)
    return o, topk_idx


compressed_attention_forward = op_of(
    "compressed_attention_forward",
    reference.compressed_attention_forward,
    returns="o lse",
    allocate=attention_outputs,
    check=(check_tensors, check_windowed),
    kernel="compressed_attention forward",
    launch="q k v cu_seqlens_q cu_seqlens_k o lse softmax_scale q_start?",
    gradients=Gradients(
        "q k v",
        "do q k v cu_seqlens_q cu_seqlens_k o lse dq dk dv softmax_scale delta gate False q_start?",
        more="delta gate",
        adds="dq",
    ),
)
"""(o [N, HQ, Dv], lse [N, HQ]); lse is natural and not differentiable."""

compressed_attention_backward = backward_of(compressed_attention_forward)
add_compressed_gradient = backward_of(compressed_attention_forward, adds=True)
