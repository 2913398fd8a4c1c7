"""Decoding: selected attention of one new token a row."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import check_places
from nsagen.ops._checks import check_tensors, check_topk_idx
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, scale_of
from nsagen.runtime import Dispatcher


def selected_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    topk_idx: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Attention of new tokens to the selected blocks of their caches.

    The decoding step of attention that is the selected branch alone; with other branches and gates
    see `native_sparse_attention_decode`.

    Args:
        q: [R, HQ, D], after rope.
        k_cache: [slots, max_length, HK, D], after rope, the new token's key among them.
        v_cache: [slots, max_length, HK, Dv].
        topk_idx: int32 [HK, R, topk], contiguous, from `block_selection_decode` or any other set
            of blocks a row: repeats count once, and entries that name no block up to the token's
            own are ignored.
        positions: int32 [R], position of each new token; -1: an idle row.
        slots: int32 [R], each row's place in the caches.
        block_size: tokens of a block.
        softmax_scale: of the scores; 1/sqrt(D) by default.
        block_table: int32 [slots, max_pages], or None. With it the caches are in pages, [pages,
            page_size, HK, dim]: token t of a slot lies in page
            block_table[slot, t // page_size] at row t % page_size.
        k_scale: float32 [slots, max_length, HK], the scales of k_cache, if that is of
            torch.float8_e4m3fn or torch.int8; v_scale: of v_cache. See `reference.quantize`.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [R, HQ, Dv]; 0 for rows that are idle or select nothing.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scale, key = scale_of(softmax_scale, q), key_of(dispatcher)
    inputs = (q, k_cache, v_cache, topk_idx, positions, slots)
    more = (block_size, scale, key, block_table, k_scale, v_scale)
    return _selected_attention_decode(*inputs, *more)


_selected_attention_decode = op_of(
    "selected_attention_decode",
    reference.selected_attention_decode,
    returns="o",
    allocate=lambda q, v_cache: q.new_empty(*q.shape[:2], v_cache.shape[-1]),
    check=(check_tensors, check_topk_idx, check_places),
    kernel="selected_attention decode",
    launch="q k_cache v_cache topk_idx positions slots o softmax_scale block_table"
    " k_scale? v_scale?",
)
