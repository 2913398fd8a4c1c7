"""Decoding: selected attention of one new token a row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import cache_dtype_of
from nsagen.ops._checks import check_topk_idx, fail
from nsagen.ops._derive import op_of
from nsagen.ops._launch import attention_sizes, key_of, scale_of
from nsagen.ops._pages import capacity_of, check_page_size, check_places
from nsagen.ops.compressed_attention_decode import check_cached
from nsagen.runtime import Dispatcher

_OP = "selected_attention decode"


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


def _check(call: Any) -> None:
    q, k_cache, table = call.q, call.k_cache, call.block_table
    inputs = (q, k_cache, call.v_cache, call.positions, call.slots, table)
    check_cached(_OP, *inputs, scales=(call.k_scale, call.v_scale))
    check_topk_idx(_OP, q, k_cache.shape[2], call.topk_idx)
    if call.block_size < 1:
        fail(_OP, "block_size must be positive", call.block_size, "64 and 128 are usual")
    if table is not None:
        check_page_size(_OP, k_cache.shape[1], "block_size", call.block_size)
    check_places(_OP, call.positions, call.slots, capacity_of(k_cache, table), k_cache, table)


_selected_attention_decode = op_of(
    "selected_attention_decode",
    reference.selected_attention_decode,
    returns="o",
    allocate=lambda q, v_cache: q.new_empty(*q.shape[:2], v_cache.shape[-1]),
    check=_check,
    kernel="selected_attention decode",
    sizes=lambda q, k_cache, v_cache, topk_idx, k_scale: {
        **attention_sizes(q, k_cache[0], v_cache[0]),
        "topk": topk_idx.shape[-1],
        "cache_dtype": cache_dtype_of(k_cache, k_scale),
    },
    context=lambda k_cache, block_table: capacity_of(k_cache, block_table),
    launch="q k_cache v_cache topk_idx positions slots o softmax_scale block_table",
    optional="k_scale v_scale",
)
