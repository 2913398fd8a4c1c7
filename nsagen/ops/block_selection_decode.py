"""Decoding: block selection of one new token a row, from a cache of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import cache_dtype_of, check_scales
from nsagen.ops._checks import check_indices, check_keys, check_rows, fail
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, scale_of, score_sizes
from nsagen.ops._pages import capacity_of, check_page_size, check_places, check_table
from nsagen.ops.block_selection import allocate_blocks
from nsagen.ops.reference.block_selection import BlockRule, Scoring
from nsagen.runtime import Dispatcher

_OP = "block_selection decode"


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


def _check(call: Any) -> None:
    q, cache, table = call.q, call.k_cache, call.block_table
    check_rows(_OP, q=q)
    if call.k_scale is not None:
        check_scales(_OP, q, k_cache=(cache, call.k_scale))
    else:
        check_rows(_OP, 4, k_cache=cache)
    check_keys(_OP, q, cache)
    if call.k_scale is None and (q.dtype != cache.dtype or q.device != cache.device):
        came = f"{cache.dtype} on {cache.device}"
        fail(_OP, f"k_cache must be {q.dtype} on {q.device}, as q is", came, "allocate it so")
    check_indices(_OP, q, (q.shape[0],), positions=call.positions, slots=call.slots)
    BlockRule(**{name: getattr(call, name) for name in BlockRule.__annotations__})
    if table is not None:
        check_table(_OP, q, table)
        check_page_size(_OP, cache.shape[1] * call.kernel_stride, "block_size", call.block_size)
    tokens = capacity_of(cache, table) * call.kernel_stride + call.kernel_size - 1
    check_places(_OP, call.positions, call.slots, tokens, cache, table)


def _context(
    k_cache: Tensor, kernel_size: int, kernel_stride: int, block_table: Tensor | None
) -> int:
    context = capacity_of(k_cache, block_table) * kernel_stride
    return context + (0 if block_table is not None else kernel_size - kernel_stride)


_block_selection_decode = op_of(
    "block_selection_decode",
    reference.block_selection_decode,
    returns="topk_idx",
    allocate=lambda q, k_cache, topk, score_heads: allocate_blocks(q, k_cache, topk, score_heads),
    check=_check,
    kernel="block_selection decode",
    sizes=lambda q, k_cache, k_scale: {
        **score_sizes(q, k_cache),
        "cache_dtype": cache_dtype_of(k_cache, k_scale),
    },
    context=_context,
    launch="q k_cache positions slots topk_idx softmax_scale block_table",
    optional="k_scale",
)
