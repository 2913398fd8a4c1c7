"""Decoding: block selection of one new token a row, from a cache of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import check_places_of_windows
from nsagen.ops._checks import check_tensors
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, scale_of
from nsagen.ops._sizes import tokens_of_windows
from nsagen.ops.block_selection import allocate_blocks
from nsagen.ops.reference.block_selection import BlockRule, Scoring
from nsagen.runtime import Dispatcher


def block_selection_decode(
    q: Tensor,
    k_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    score_norm: str = "softmax",
    score_heads: str = "sum",
    score_pool: str = "overlap",
    k_scale: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """The blocks that new tokens select, from the compressed keys or index keys of a cache.

    A softmax is exact here, also where prefill normalizes by coarse keys.

    Args:
        q: [R, HQ, D], queries or index queries, after rope.
        k_cache: [slots, max_windows, HK, D]; index keys are windows of one token.
        positions: int32 [R], position of each new token; -1: an idle row.
        slots: int32 [R], each row's place in the cache.
        kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, score_norm,
            score_heads, score_pool: as in `block_selection`.
        softmax_scale: of the scores; 1/sqrt(D) by default.
        block_table: int32 [slots, max_pages], or None. With it the cache is in pages, [pages,
            page_size // kernel_stride, HK, D]: window i of a slot lies in the page that
            block_table names for token i * kernel_stride.
        k_scale: float32 [slots, max_windows, HK], the scales of k_cache, if that is of
            torch.float8_e4m3fn or torch.int8; see `reference.quantize`.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        topk_idx int32 [HK, R, topk], or [HQ, R, topk] with score_heads "each": ascending block
        indices, then -1; -1 for idle rows.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scoring = (score_norm, score_heads, score_pool)
    Scoring(*scoring)
    statics = (kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    scale, key = scale_of(softmax_scale, q), key_of(dispatcher)
    if torch.is_grad_enabled():
        q, k_cache = q.detach(), k_cache.detach()
    return _block_selection_decode(
        q, k_cache, positions, slots, *statics, scale, key, block_table, *scoring, k_scale
    )


_block_selection_decode = op_of(
    "block_selection_decode",
    reference.block_selection_decode,
    returns="topk_idx",
    allocate=lambda q, k_cache, topk, score_heads: allocate_blocks(q, k_cache, topk, score_heads),
    check=(check_tensors, BlockRule, check_places_of_windows),
    kernel="block_selection decode",
    context=tokens_of_windows,
    launch="q k_cache positions slots topk_idx softmax_scale block_table k_scale?",
)
