"""Decoding, first step: rope, append the new keys and values, compress a window that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsagen.core.workload import BRANCH_KV
from nsagen.ops import reference
from nsagen.ops._cache_checks import CACHES, check, check_separate, hidden_size
from nsagen.ops._calls import KnownCalls
from nsagen.ops._define import define_op
from nsagen.ops._launch import find_kernel, key_of, on_kernels
from nsagen.ops._pages import capacity_of
from nsagen.ops.reference.compress import Weight, tensors_of
from nsagen.ops.separate import SeparateKV
from nsagen.runtime import Dispatcher

_OP = "cache_append"
_WRITTEN = (*CACHES, "v_raw", "k_window_cache", "v_window_cache")


def cache_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_k: Weight,
    w_v: Weight,
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
    v_compress_type: str | None = None,
    pe_v: Tensor | None = None,
    block_table: Tensor | None = None,
    separate: SeparateKV | None = None,
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
        v_compress_type: how values are compressed, where it is not compress_type.
        pe_v: [HK, kernel_size, Dv], added to a window's values, or None.
        separate: the compressed and the sliding branch's own keys, values and caches. Without it
            all branches have the same, and compressed values are made of v_cache.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        q after rope, [R, HQ, D].

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    w_k, *w_k2 = tensors_of(w_k) or (None,)
    w_v, *w_v2 = tensors_of(w_v) or (None,)
    key = key_of(dispatcher)
    usual = (
        *(q, k, v, cos, sin, w_k, w_v, pe, positions, slots),
        *(k_cache, v_cache, ck_cache, cv_cache, k_raw),
        *(compress_type, kernel_size, kernel_stride, key, block_table),
    )
    own_type = v_compress_type if v_compress_type not in (None, compress_type) else ""
    if separate is None and pe_v is None and not (own_type or w_k2 or w_v2):
        return cache_append_decode(*usual)
    own = (None,) * len(_OWN) if separate is None else [vars(separate)[name] for name in _OWN]
    return cache_append_decode(*usual, own_type, *(w_k2 or (None,)), *(w_v2 or (None,)), pe_v, *own)


_OWN = (
    *("k_compress", "v_compress", "k_window", "v_window"),
    *("v_raw", "k_window_cache", "v_window_cache"),
)
"""Of a `SeparateKV`, in the op's order."""


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
    v_compress_type: str = "",
    w_k2: Tensor | None = None,
    w_v2: Tensor | None = None,
    pe_v: Tensor | None = None,
    k_compress: Tensor | None = None,
    v_compress: Tensor | None = None,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    v_raw: Tensor | None = None,
    k_window_cache: Tensor | None = None,
    v_window_cache: Tensor | None = None,
) -> Tensor:
    """q after rope, [R, HQ, D]; see `cache_append`. w_k2, w_v2: second layers of an mlp."""
    caches = (k_cache, v_cache, ck_cache, cv_cache, k_raw)
    inputs = (q, k, v, cos, sin, w_k, w_v, pe, positions, slots, *caches)
    own = (k_compress, v_compress, k_window, v_window, v_raw, k_window_cache, v_window_cache)
    weights = (_weight(w_k, w_k2), _weight(w_v, w_v2))
    joined = (*inputs[:5], *weights, *inputs[7:])
    types = (compress_type, v_compress_type or compress_type)
    check(joined, types, kernel_size, kernel_stride, block_table, pe_v)
    separate = check_separate(own, k, v, caches, kernel_size)
    if not on_kernels(q):
        return reference.cache_append(
            *joined,
            compress_type=compress_type,
            v_compress_type=v_compress_type,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            pe_v=pe_v,
            block_table=block_table,
            separate=separate,
        )
    dims = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1])
    values = (compress_type, *dims, kernel_size, kernel_stride, pe is not None)
    separated = BRANCH_KV[k_window is not None]
    optional = (types[1], hidden_size(*weights), pe_v is not None, separated)
    context = capacity_of(k_cache, block_table)
    kernel = find_kernel(dispatcher, _OP, "decode", (*values, *optional), q, context)
    statics = (compress_type, kernel_size, kernel_stride, dispatcher)
    args = (*inputs, *statics, block_table, v_compress_type, w_k2, w_v2, pe_v, *own)
    return _CALLS.learn(args, kernel).run(args)


def _weight(first: Tensor | None, second: Tensor | None) -> Weight:
    """A weight as `cache_append` takes it."""
    return first if first is None or second is None else (first, second)


def _allocate(args: tuple[Any, ...]) -> tuple[Tensor]:
    return (torch.empty_like(args[0], memory_format=torch.contiguous_format),)


def _to_launch(args: tuple[Any, ...], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    more = args[21:]
    return *args[:15], *outputs, args[19], *(() if more.count(None) == len(more) else more)


_CALLS = KnownCalls((*range(15), 19, *range(21, 31)), 31, _allocate, _to_launch)


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
    v_compress_type: str = "",
    w_k2: Tensor | None = None,
    w_v2: Tensor | None = None,
    pe_v: Tensor | None = None,
    k_compress: Tensor | None = None,
    v_compress: Tensor | None = None,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    v_raw: Tensor | None = None,
    k_window_cache: Tensor | None = None,
    v_window_cache: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


cache_append_decode = define_op(
    "cache_append_decode", _cache_append_decode, _fake, _CALLS, _WRITTEN
)
