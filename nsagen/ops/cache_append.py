"""Decoding, first step: rope, append the new keys and values, compress a window that they fill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._calls import KnownCalls, signature
from nsagen.ops._checks import (
    check_attention,
    check_compress_weights,
    check_indices,
    check_rows,
    fail,
)
from nsagen.ops._define import define_op
from nsagen.ops._launch import find_kernel, key_of, on_kernels, run_kernel
from nsagen.ops._pages import capacity_of, check_page_size, check_places, check_table
from nsagen.ops.reference._checks import check_windows
from nsagen.ops.rope import check_tables
from nsagen.runtime import Dispatcher

_OP = "cache_append"
_CACHES = ("k_cache", "v_cache", "ck_cache", "cv_cache", "k_raw")


def cache_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_k: Tensor | None,
    w_v: Tensor | None,
    pe: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ck_cache: Tensor,
    cv_cache: Tensor,
    k_raw: Tensor,
    *,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    block_table: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Append one token of each row to the caches, which change in place.

    Args:
        q: [R, HQ, D]; k: [R, HK, D]; v: [R, HK, Dv], all before rope.
        cos, sin: float32 [P, D // 2].
        w_k, w_v: weights that compress keys and values, as in `compress`; None for avgpool.
        pe: [HK, kernel_size, D], added to a window's keys, or None.
        positions: int32 [R], position of each new token; -1: an idle row, which is skipped.
        slots: int32 [R], each row's place in the caches.
        k_cache: [slots, max_length, HK, D], keys after rope; v_cache: the same for values.
        ck_cache: [slots, max_windows, HK, D], compressed keys after rope at position
            i * kernel_stride; cv_cache: the same for values.
        k_raw: [slots, kernel_size, HK, D], keys before rope, token t at t % kernel_size.
        block_table: int32 [slots, max_pages], or None. With it the first four caches are in
            pages: k_cache and v_cache [pages, page_size, HK, dim], ck_cache and cv_cache
            [pages, page_size // kernel_stride, HK, dim]. Token t of a slot lies in page
            block_table[slot, t // page_size], and so does the window that starts at token t.
            Entries of pages that no row reaches may hold anything.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        q after rope, [R, HQ, D].

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    return cache_append_decode(
        q,
        k,
        v,
        cos,
        sin,
        w_k,
        w_v,
        pe,
        positions,
        slots,
        k_cache,
        v_cache,
        ck_cache,
        cv_cache,
        k_raw,
        compress_type,
        kernel_size,
        kernel_stride,
        key_of(dispatcher),
        block_table,
    )


def _cache_append_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_k: Tensor | None,
    w_v: Tensor | None,
    pe: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ck_cache: Tensor,
    cv_cache: Tensor,
    k_raw: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: str = "",
    block_table: Tensor | None = None,
) -> Tensor:
    """q after rope, [R, HQ, D]; see `cache_append`."""
    caches = (k_cache, v_cache, ck_cache, cv_cache, k_raw)
    inputs = (q, k, v, cos, sin, w_k, w_v, pe, positions, slots, *caches)
    call = signature(
        [x for x in (*inputs, block_table) if x is not None],
        *(w_k is None, w_v is None, pe is None, compress_type),
        *(kernel_size, kernel_stride, dispatcher),
    )
    kernel = _CALLS.get(call) if on_kernels(q) else None
    if kernel is None:
        _check(inputs, compress_type, kernel_size, kernel_stride, block_table)
        if not on_kernels(q):
            return reference.cache_append(
                *inputs,
                compress_type=compress_type,
                kernel_size=kernel_size,
                kernel_stride=kernel_stride,
                block_table=block_table,
            )
        dims = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1])
        values = (compress_type, *dims, kernel_size, kernel_stride, pe is not None)
        context = capacity_of(k_cache, block_table)
        kernel = _CALLS.add(call, find_kernel(dispatcher, _OP, "decode", values, q, context))
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    run_kernel(kernel, q, (*inputs, q_out, block_table))
    return q_out


_CALLS = KnownCalls()


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_k: Tensor | None,
    w_v: Tensor | None,
    pe: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ck_cache: Tensor,
    cv_cache: Tensor,
    k_raw: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: str = "",
    block_table: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


cache_append_decode = define_op("cache_append_decode", _cache_append_decode, _fake, _CACHES)


def _check(
    inputs: tuple[Any, ...],
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    block_table: Tensor | None,
) -> None:
    """The contract of `cache_append`."""
    q, k, v, cos, sin, w_k, w_v, pe, positions, slots, *caches = inputs
    check_attention(_OP, q, k, v)
    if q.shape[0] != k.shape[0]:
        fail(
            _OP,
            "q and k must have the same rows",
            f"{q.shape[0]} and {k.shape[0]}",
            "pass one a row",
        )
    check_tables(_OP, q, cos, sin)
    check_windows(_OP, kernel_size, kernel_stride)
    check_compress_weights(_OP, k, w_k, pe, compress_type, kernel_size)
    check_compress_weights(_OP, v, w_v, None, compress_type, kernel_size)
    check_indices(_OP, q, (q.shape[0],), positions=positions, slots=slots)
    if block_table is not None:
        check_table(_OP, q, block_table)
    _check_caches(k, v, tuple(caches), kernel_size, kernel_stride, block_table)
    tokens = min(capacity_of(caches[0], block_table), cos.shape[0])
    check_places(_OP, positions, slots, tokens, caches[0], block_table)


def _check_caches(
    k: Tensor,
    v: Tensor,
    caches: tuple[Tensor, ...],
    kernel_size: int,
    kernel_stride: int,
    block_table: Tensor | None,
) -> None:
    """Five caches [slots or pages, length, HK, dim] of k's and v's dtype, heads and sizes."""
    named = dict(zip(_CACHES, caches, strict=True))
    check_rows(_OP, 4, **named)
    for name, cache in named.items():
        like = v if name in ("v_cache", "cv_cache") else k
        places = caches[0].shape[0]
        if block_table is not None and name == "k_raw":
            places = block_table.shape[0]
        if cache.shape[2:] != like.shape[1:] or cache.shape[0] != places:
            rule = f"{name} must be [{places}, length, {like.shape[1]}, {like.shape[2]}]"
            fail(_OP, rule, tuple(cache.shape), "allocate an NSACache")
        if cache.dtype != k.dtype or cache.device != k.device:
            came = f"{cache.dtype} on {cache.device}"
            fail(_OP, f"{name} must be {k.dtype} on {k.device}", came, "allocate it so")
    for one, other in ((0, 1), (2, 3)):
        if caches[one].shape[1] != caches[other].shape[1]:
            came = f"{caches[one].shape[1]} and {caches[other].shape[1]}"
            rule = f"{_CACHES[one]} and {_CACHES[other]} must have one length"
            fail(_OP, rule, came, "allocate an NSACache")
    if caches[4].shape[1] != kernel_size:
        rule = "k_raw must hold kernel_size tokens"
        fail(_OP, rule, f"{caches[4].shape[1]} for kernel_size {kernel_size}", "resize it")
    if block_table is None:
        return
    page_size, windows = caches[0].shape[1], caches[2].shape[1]
    check_page_size(_OP, page_size, "kernel_stride", kernel_stride)
    if windows * kernel_stride != page_size:
        rule = f"ck_cache must have {page_size // kernel_stride} windows a page"
        fail(_OP, rule, windows, "give each page of tokens one of the windows that start in it")
