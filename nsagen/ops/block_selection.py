"""Block selection: the blocks of tokens that matter most to each query.

By default as in NSA, score[t, j] = sum over the group's heads and windows i of p[h, t, i] *
overlap(i, j) / s; other members of the family by `score_norm`, `score_heads` and `score_pool`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_tensors, check_windowed
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, scale_of
from nsagen.ops.reference.block_selection import BlockRule, Scoring, check_lse
from nsagen.runtime import Dispatcher


def block_selection(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    q_start: Tensor | None = None,
    score_norm: str = "softmax",
    score_heads: str = "sum",
    score_pool: str = "overlap",
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Choose each query's blocks: the forced ones and the best of the rest by score.

    score[t, r, j] = POOL over windows i touching block j, visible, of RED over heads h in r of
    NORM(q[t, h] . k[i]). Candidates: j <= t // block_size. Always taken: j < init_blocks and
    j > t // block_size - local_blocks. Equal scores: the lower index.

    Args:
        q: [N, HQ, D], queries, or index queries.
        k: [>= sum M, HK, D], compressed keys, or index keys: windows of one token.
        lse: float32 [N, HQ], natural, of the scores under a softmax, from `compressed_lse`; None
            with score_norm "none".
        cu_seqlens_q: int32 [batch + 1]; cu_seqlens_k: the same of the windows.
        kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.
        block_size: tokens of a block; topk: blocks selected a token.
        init_blocks: blocks at the start that are always selected.
        local_blocks: blocks up to a token's own that are always selected.
        softmax_scale: of the scores; 1/sqrt(D) by default. With score_norm "none" it changes no
            choice.
        q_start: int32 [batch], position of each sequence's first query; 0 by default.
        score_norm: "softmax" or "none": NORM.
        score_heads: "sum": one selection per key head; "each": one per query head.
        score_pool: "overlap": POOL is a sum weighted by shared tokens; "max": the largest.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        topk_idx int32 [HK, N, topk], or [HQ, N, topk] with score_heads "each": ascending block
        indices within the sequence, then -1. It has no gradient.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scoring = (score_norm, score_heads, score_pool)
    Scoring(*scoring)
    windows = (cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride)
    blocks = (block_size, topk, init_blocks, local_blocks)
    more = (scale_of(softmax_scale, q), key_of(dispatcher), q_start)
    return select_blocks(q, k, lse, *windows, *blocks, *more, *scoring)


def allocate_blocks(q: Tensor, k: Tensor, topk: int, score_heads: str = "sum") -> Tensor:
    """topk_idx of q [N, HQ, D] and k [..., HK, D], to be written."""
    heads = q.shape[1] if score_heads == "each" else k.shape[-2]
    return q.new_empty((heads, q.shape[0], topk), dtype=torch.int32)


block_selection_forward = op_of(
    "block_selection_forward",
    reference.block_selection,
    returns="topk_idx",
    allocate=allocate_blocks,
    check=(check_tensors, check_windowed, BlockRule, check_lse),
    kernel="block_selection forward",
    launch="q k lse cu_seqlens_q cu_seqlens_k topk_idx softmax_scale q_start?",
)


def select_blocks(q: Tensor, k: Tensor, lse: Tensor | None, *args: Any) -> Tensor:
    """`block_selection_forward` for tensors that require gradients; it has no gradient."""
    if torch.is_grad_enabled():
        q, k, lse = q.detach(), k.detach(), None if lse is None else lse.detach()
    return block_selection_forward(q, k, lse, *args)
