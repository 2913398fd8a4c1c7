"""The loss that trains a learned index: KL of its distribution to the attention's."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops._checks import check_cu_seqlens, check_tensors, check_topk_idx, fail
from nsagen.ops._derive import Gradients, dense, op_of
from nsagen.ops._launch import key_of, lse_dtype, scale_of
from nsagen.ops.reference.index_loss import dense_index_loss_forward as on_reference_dense
from nsagen.ops.reference.index_loss import index_loss_forward as on_reference
from nsagen.runtime import Dispatcher

_OP = "index_loss"


def index_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    topk_idx: Tensor | None,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    index_scale: float | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """KL(attention || index) of each query and key/value head, over what it selected.

    The teacher is the mean over the group's heads of softmax(softmax_scale q k^T), the student
    softmax(index_scale index_q index_k^T), both over the tokens u <= t of the selected blocks, and
    the loss is sum_u teacher log(teacher / student). Sequences are whole: chunks are refused.

    Args:
        q: [N, HQ, D] and k: [N, HK, D], after rope; constants of the loss.
        index_q: [N, HK, Di], one index head per key/value head; index_k: [N, 1, Di].
        topk_idx: int32 [HK, N, topk], contiguous, block indices as a set; or None for the dense
            warm-up: all tokens u <= t.
        cu_seqlens: int32 [batch + 1].
        block_size: tokens of a block.
        softmax_scale: of the attention's scores; 1/sqrt(D) by default.
        index_scale: of the index's scores; 1/sqrt(Di) by default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        [HK, N] float32 (float64 for float64 inputs), 0 where nothing is selected. Differentiable in
        index_q and index_k alone.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scales = scale_of(softmax_scale, q), scale_of(index_scale, index_q)
    tensors, how = (q.detach(), k.detach(), index_q, index_k), (*scales, key_of(dispatcher))
    if topk_idx is None:
        _check_block_size(_OP, block_size)
        return dense_index_loss_forward(*tensors, cu_seqlens, *how)[0]
    return index_loss_forward(*tensors, topk_idx, cu_seqlens, block_size, *how)[0]


def _check(op: str, q: Tensor, k: Tensor, cu_seqlens: Tensor) -> None:
    if q.shape[0] != k.shape[0]:
        rule = "q and k must have the same tokens: a chunk (q_start, cu_seqlens_k) has no loss"
        fail(op, rule, f"{q.shape[0]} and {k.shape[0]}", "pass whole sequences")
    check_cu_seqlens(op, "cu_seqlens", cu_seqlens, q)


def _check_block_size(op: str, block_size: int) -> None:
    if block_size < 1:
        fail(op, "block_size must be positive", block_size, "pass block selection's")


def _outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (tokens, heads) = lse_dtype(q), k.shape[:2]
    loss = q.new_empty((heads, tokens), dtype=dtype)
    lse = q.new_empty(q.shape[:2], dtype=dtype)
    return loss, lse, q.new_empty((tokens, heads), dtype=dtype)


def _dense_outputs(q: Tensor, k: Tensor, index_q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_outputs(q, k), index_q.new_empty(index_q.shape)


index_loss_forward = op_of(
    "index_loss_forward",
    on_reference,
    returns="loss lse lse_index",
    allocate=_outputs,
    check=(check_tensors, _check, _check_block_size, check_topk_idx),
    kernel="index_loss forward",
    launch="q k index_q index_k topk_idx cu_seqlens loss lse lse_index softmax_scale index_scale",
    gradients=Gradients(
        "index_q index_k",
        # q first: its dtype is the kernel's, and dloss is float32.
        "q k index_q index_k topk_idx cu_seqlens dloss lse lse_index dindex_q dindex_k"
        " softmax_scale index_scale",
        prepare=dense("dloss"),
    ),
)
"""(loss [HK, N], lse [N, HQ], lse_index [N, HK]); the last two are not differentiable."""

dense_index_loss_forward = op_of(
    "dense_index_loss_forward",
    on_reference_dense,
    returns="loss lse lse_index slope",
    allocate=_dense_outputs,
    check=(check_tensors, _check),
    kernel="dense_index_loss forward",
    launch="q k index_q index_k cu_seqlens loss lse lse_index slope softmax_scale index_scale",
    gradients=Gradients(
        "index_q index_k",
        "q k index_q index_k cu_seqlens dloss lse lse_index slope dindex_q dindex_k"
        " softmax_scale index_scale",
        prepare=dense("dloss"),
    ),
)
"""The same over all tokens, and the loss's slope [N, HK, Di]: its gradient for index_q."""
