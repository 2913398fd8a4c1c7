"""Decoding, first step: rope, append the new keys and values, compress a window that they fill."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import (
    check_attention,
    check_compress_weights,
    check_indices,
    check_rows,
    fail,
)
from nsagen.ops._launch import key_of, launch, on_kernels
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
) -> Tensor:
    """q after rope, [R, HQ, D]; see `cache_append`."""
    caches = (k_cache, v_cache, ck_cache, cv_cache, k_raw)
    check_attention(_OP, q, k, v)
    check_tables(_OP, q.shape[2], cos, sin)
    check_windows(_OP, kernel_size, kernel_stride)
    check_compress_weights(_OP, k, w_k, pe, compress_type, kernel_size)
    check_compress_weights(_OP, v, w_v, None, compress_type, kernel_size)
    check_indices(_OP, q, (q.shape[0],), positions=positions, slots=slots)
    _check_caches(k, v, caches, kernel_size)
    inputs = (q, k, v, cos, sin, w_k, w_v, pe, positions, slots, *caches)
    if not on_kernels(q):
        return reference.cache_append(
            *inputs,
            compress_type=compress_type,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
        )
    q_out = q.new_empty(q.shape)
    dims = (q.shape[2], v.shape[2], q.shape[1] // k.shape[1])
    values = (compress_type, *dims, kernel_size, kernel_stride, pe is not None)
    launch(dispatcher, _OP, "decode", values, (*inputs, q_out), context=k_cache.shape[1])
    return q_out


# Defined by its schema: `custom_op` reads a mutating op's schema anew at every call, which took
# three times as long as all the checks above.
_NAME = "nsagen::cache_append_decode"
_SCHEMA = torch.library.infer_schema(_cache_append_decode, mutates_args=_CACHES)
torch.library.define(_NAME, _SCHEMA)
torch.library.impl(_NAME, ("cpu", "cuda"), _cache_append_decode)
cache_append_decode = torch.ops.nsagen.cache_append_decode.default


@torch.library.register_fake(_NAME)
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
) -> Tensor:
    return q.new_empty(q.shape)


def _check_caches(k: Tensor, v: Tensor, caches: tuple[Tensor, ...], kernel_size: int) -> None:
    """Five caches [slots, length, HK, dim] of k's and v's dtype, heads and sizes."""
    named = dict(zip(_CACHES, caches, strict=True))
    check_rows(_OP, 4, **named)
    for name, cache in named.items():
        like = v if name in ("v_cache", "cv_cache") else k
        if cache.shape[2:] != like.shape[1:] or cache.shape[0] != caches[0].shape[0]:
            rule = f"{name} must be [{caches[0].shape[0]}, length, {like.shape[1]}, "
            fail(_OP, f"{rule}{like.shape[2]}]", tuple(cache.shape), "allocate an NSACache")
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
