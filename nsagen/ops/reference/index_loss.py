"""The loss that trains a learned index: its distribution against the attention's."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._attend import chunks, contract, recomputed, scale_of, scores_of, upcast
from nsagen.ops.reference._checks import check_heads, sequence_bounds
from nsagen.ops.reference.selected_attention import selected_tokens


def index_loss_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`index_loss`, and the log-sum-exps of the attention [N, HQ] and of the index [N, HK]."""
    scales = softmax_scale, index_scale
    return _forward(q, k, index_q, index_k, topk_idx, cu_seqlens, block_size, *scales)[:3]


def dense_index_loss_forward(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    cu_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    index_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same over all tokens u <= t, and its slope: the gradient for index_q, [N, HK, Di]."""
    tensors = (q, k, index_q, index_k, None, cu_seqlens)
    loss, lse, lse_index, slope = _forward(*tensors, 1, softmax_scale, index_scale)
    return loss, lse, lse_index, slope.to(index_q.dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    topk_idx: Tensor | None,
    cu_seqlens: Tensor,
    block_size: int,
    softmax_scale: float | None,
    index_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    where = "index_loss"
    check_heads(where, q, k, k)
    check_heads(where, index_q, index_k, index_k)
    heads = k.shape[1]
    if index_q.shape[:2] != (q.shape[0], heads) or index_k.shape[:2] != (k.shape[0], 1):
        raise InvalidInputError(
            f"{where}: index_q must be [N, HK, Di] and index_k [N, 1, Di] with N={q.shape[0]} and "
            f"HK={heads}; got {tuple(index_q.shape)} and {tuple(index_k.shape)}; "
            "pass one index head per key/value head"
        )
    if topk_idx is not None and topk_idx.shape[:2] != (heads, q.shape[0]):
        raise InvalidInputError(
            f"{where}: topk_idx must be [HK, N, topk] with HK={heads} and N={q.shape[0]}; got "
            f"{tuple(topk_idx.shape)}; pass the indices of block selection, heads first"
        )
    bounds = sequence_bounds(where, cu_seqlens, q.shape[0])
    scales = scale_of(softmax_scale, q.shape[-1]), scale_of(index_scale, index_q.shape[-1])
    q, k, index_q, index_k = upcast(q.detach(), k.detach(), index_q, index_k)
    parts = []
    for start, end in bounds:
        for lo, hi in chunks(end - start, (q.shape[1] + heads) * (end - start)):
            rows, keys = slice(start + lo, start + hi), slice(start, start + hi)
            chosen = None if topk_idx is None else topk_idx[:, rows]
            given = (q[rows], k[keys], index_q[rows], index_k[keys], chosen)
            parts.append(recomputed(_chunk_loss, *given, lo, block_size, *scales))
    losses, lses, index_lses, slopes = zip(*parts, strict=True)
    return torch.cat(losses, 1), torch.cat(lses), torch.cat(index_lses), torch.cat(slopes)


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
) -> Tensor:
    """KL(attention || index) of each query and key/value head.

    Over the tokens u <= t of the selected blocks, or over all tokens u <= t where topk_idx is None
    (the dense warm-up): the teacher is the mean over the group's heads of
    softmax(softmax_scale q k^T), the student softmax(index_scale index_q index_k^T), and the loss
    is sum_u teacher log(teacher / student).

    Args:
        q: [N, HQ, D], after rope.
        k: [N, HK, D], after rope.
        index_q: [N, HK, Di], one index head per key/value head, after its norm and rope.
        index_k: [N, 1, Di], one key head for all.
        topk_idx: int32 [HK, N, topk], a set of block indices as in `selected_attention`, or None.
        cu_seqlens: int32 [batch + 1].
        block_size: tokens of a block.
        softmax_scale: of the attention's scores; 1/sqrt(D) unless given.
        index_scale: of the index's scores; 1/sqrt(Di) unless given.

    Returns:
        [HK, N] in float32 (float64 for float64 inputs), 0 where nothing is selected.
        Differentiable in index_q and index_k alone: q, k and topk_idx are constants.
    """
    return index_loss_forward(
        *(q, k, index_q, index_k, topk_idx, cu_seqlens),
        block_size=block_size,
        softmax_scale=softmax_scale,
        index_scale=index_scale,
    )[0]


def _chunk_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    topk_idx: Tensor | None,
    first: int,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [HK, C], log-sum-exps [C, HQ] and [C, HK], and slope [C, HK, Di].

    Of the queries first .. first + C - 1 of one sequence and its keys up to them.
    """
    keys = torch.arange(k.shape[0], device=q.device)
    tokens = first + torch.arange(q.shape[0], device=q.device)
    seen = (keys <= tokens[:, None]).expand(k.shape[1], -1, -1)
    if topk_idx is not None:
        seen = seen & selected_tokens(topk_idx, keys, block_size)
    empty = ~seen.any(-1, keepdim=True)
    hidden = ~seen & ~empty  # an empty row keeps finite scores: no NaN in its gradient

    scores = scores_of(q, k, softmax_scale).masked_fill(hidden[:, None], float("-inf"))
    teacher = torch.softmax(scores, -1).mean(1)  # [HK, C, T]
    index_scores = scores_of(index_q, index_k, index_scale)[0]  # one key head: [1, HK, C, T]
    index_scores = index_scores.masked_fill(hidden, float("-inf"))
    student = torch.log_softmax(index_scores, -1)
    terms = torch.special.xlogy(teacher, teacher) - teacher * student.masked_fill(hidden, 0.0)
    nothing = empty.squeeze(-1)
    lse = scores.detach().logsumexp(-1).masked_fill(nothing[:, None], float("-inf"))
    index_lse = index_scores.detach().logsumexp(-1).masked_fill(nothing, float("-inf"))
    loss = terms.sum(-1).masked_fill(nothing, 0.0)
    dx = (student.detach().exp() - teacher).masked_fill(hidden | empty, 0.0)
    slope = contract("hct,td->chd", dx, index_k.detach()[:, 0]) * index_scale
    return loss, lse.permute(2, 0, 1).flatten(1), index_lse.T, slope
