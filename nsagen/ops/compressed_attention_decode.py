"""Decoding, second step: compressed attention and block selection of one new token a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import cache_dtype_of, check_scales
from nsagen.ops._checks import (
    check_indices,
    check_keys,
    check_rows,
    fail,
    shapes,
)
from nsagen.ops._derive import op_of
from nsagen.ops._launch import attention_sizes, key_of, scale_of
from nsagen.ops._pages import capacity_of, check_page_size, check_places, check_table
from nsagen.ops.reference.block_selection import BlockRule
from nsagen.runtime import Dispatcher

_OP = "compressed_attention decode"


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


def check_cached(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None = None,
    kind: str = "",
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """q [R, HQ, D], caches [slots or pages, length, HK, D | Dv] of its dtype, int32 indices.

    Args:
        kind: before the caches' names: "c" for compressed ones.
        scales: of keys and values, if these are quantized.
    """
    check_rows(op, q=q)
    caches = {f"{kind}k_cache": k_cache, f"{kind}v_cache": v_cache}
    quantized = scales != (None, None)
    if quantized:
        pairs = zip(caches.values(), scales, strict=True)
        check_scales(op, q, **dict(zip(caches, pairs, strict=True)))
    else:
        check_rows(op, 4, **caches)
    check_keys(op, q, k_cache)
    if k_cache.shape[:3] != v_cache.shape[:3]:
        came = shapes({"keys": k_cache, "values": v_cache})
        fail(op, "caches must agree in slots, length and heads", came, "allocate an NSACache")
    if not quantized and (q.dtype != k_cache.dtype or q.device != k_cache.device):
        came = f"{k_cache.dtype} on {k_cache.device}"
        fail(op, f"caches must be {q.dtype} on {q.device}, as q is", came, "allocate them so")
    check_indices(op, q, (q.shape[0],), positions=positions, slots=slots)
    if block_table is not None:
        check_table(op, q, block_table)


def _check(call: Any) -> None:
    table = call.block_table
    check_cached(
        *(_OP, call.q, call.ck_cache, call.cv_cache, call.positions, call.slots, table, "c"),
        scales=(call.ck_scale, call.cv_scale),
    )
    BlockRule(**{name: getattr(call, name) for name in BlockRule.__annotations__})
    if table is not None:
        page_size = call.ck_cache.shape[1] * call.kernel_stride
        check_page_size(_OP, page_size, "block_size", call.block_size)
    tokens = capacity_of(call.ck_cache, table) * call.kernel_stride + call.kernel_size - 1
    check_places(_OP, call.positions, call.slots, tokens, call.ck_cache, table)


def _context(
    ck_cache: Tensor, kernel_size: int, kernel_stride: int, block_table: Tensor | None
) -> int:
    context = capacity_of(ck_cache, block_table) * kernel_stride
    return context + (0 if block_table is not None else kernel_size - kernel_stride)


def _allocate(q: Tensor, cv_cache: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    o = q.new_empty((q.shape[0], q.shape[1], cv_cache.shape[3]))
    return o, q.new_empty((cv_cache.shape[2], q.shape[0], topk), dtype=torch.int32)


def _sizes(q: Tensor, ck_cache: Tensor, cv_cache: Tensor, ck_scale: Tensor | None) -> Any:
    sizes = attention_sizes(q, ck_cache[0], cv_cache[0])
    return {**sizes, "cache_dtype": cache_dtype_of(ck_cache, ck_scale)}


_compressed_attention_decode = op_of(
    "compressed_attention_decode",
    reference.compressed_attention_decode,
    returns="o topk_idx",
    allocate=_allocate,
    check=_check,
    kernel="compressed_attention decode",
    sizes=_sizes,
    context=_context,
    launch="q ck_cache cv_cache positions slots o topk_idx softmax_scale block_table",
    optional="ck_scale cv_scale",
)
