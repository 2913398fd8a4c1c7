"""Decoding, second step: compressed attention and block selection of one new token a row."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import check_places_of_windows
from nsagen.ops._checks import check_tensors
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, scale_of
from nsagen.ops._sizes import tokens_of_windows
from nsagen.ops.block_selection import allocate_blocks
from nsagen.ops.reference.block_selection import BlockRule
from nsagen.runtime import Dispatcher


def compressed_attention_decode(
    q: Tensor,
    ck_cache: Tensor,
    cv_cache: Tensor,
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
    ck_scale: Tensor | None = None,
    cv_scale: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens to the compressed cache, and the blocks that they select.

    Args:
        q: [R, HQ, D], after rope.
        ck_cache: [slots, max_windows, HK, D], after rope; cv_cache: [slots, max_windows, HK, Dv].
        positions: int32 [R], position of each new token; -1: an idle row.
        slots: int32 [R], each row's place in the caches.
        kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks: as in
            `compressed_attention`.
        softmax_scale: of the scores; 1/sqrt(D) by default.
        block_table: int32 [slots, max_pages], or None. With it the caches are in pages, [pages,
            page_size // kernel_stride, HK, dim]: window i of a slot lies in the page that
            block_table names for token i * kernel_stride; see `cache_append`.
        ck_scale: float32 [slots, max_windows, HK], the scales of ck_cache, if that is of
            torch.float8_e4m3fn or torch.int8; cv_scale: of cv_cache. See `reference.quantize`.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [R, HQ, Dv], and topk_idx int32 [HK, R, topk]: ascending block indices, then -1.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    statics = (kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    scale, key = scale_of(softmax_scale, q), key_of(dispatcher)
    return _compressed_attention_decode(
        *(q, ck_cache, cv_cache, positions, slots),
        *(*statics, scale, key, block_table, ck_scale, cv_scale),
    )


def _allocate(q: Tensor, cv_cache: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], cv_cache.shape[-1])), allocate_blocks(q, cv_cache, topk)


_compressed_attention_decode = op_of(
    "compressed_attention_decode",
    reference.compressed_attention_decode,
    returns="o topk_idx",
    allocate=_allocate,
    check=(check_tensors, BlockRule, check_places_of_windows),
    kernel="compressed_attention decode",
    context=tokens_of_windows,
    launch="q ck_cache cv_cache positions slots o topk_idx softmax_scale block_table"
    " ck_scale? cv_scale?",
)
