"""The contract of appending to the caches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsagen.ops._checks import (
    check_attention,
    check_compress_weights,
    check_indices,
    check_like,
    check_rows,
    fail,
)
from nsagen.ops._pages import capacity_of, check_page_size, check_places, check_table
from nsagen.ops.reference._checks import check_windows
from nsagen.ops.reference.compress import Weight
from nsagen.ops.rope import check_tables
from nsagen.ops.separate import SeparateKV

_OP = "cache_append"
CACHES = ("k_cache", "v_cache", "ck_cache", "cv_cache", "k_raw")


def hidden_size(w_k: Weight, w_v: Weight) -> int:
    """The hidden size of the mlps among two weights; 0 where there is none."""
    sizes = [w[0].shape[-1] for w in (w_k, w_v) if isinstance(w, tuple)]
    if len(set(sizes)) > 1:
        rule = "the mlps of keys and values must have one hidden size"
        fail(_OP, rule, f"{sizes[0]} and {sizes[1]}", "make both as wide")
    return sizes[0] if sizes else 0


def check_separate(
    own: tuple[Tensor | None, ...],
    k: Tensor,
    v: Tensor,
    caches: tuple[Tensor, ...],
    kernel_size: int,
) -> SeparateKV | None:
    """The branches' own tensors, which are like those that they stand beside; or none at all."""
    given = [tensor for tensor in own if tensor is not None]
    if not given:
        return None
    if len(given) < len(own):
        rule = "the branches' own rows and caches must come together"
        fail(_OP, rule, f"{len(given)} of {len(own)}", "pass a SeparateKV")
    one = SeparateKV(*given)
    check_rows(_OP, k=k, k_compress=one.k_compress, k_window=one.k_window)
    check_rows(_OP, v=v, v_compress=one.v_compress, v_window=one.v_window)
    check_like(_OP, ("k", k), k_compress=one.k_compress, k_window=one.k_window)
    check_like(_OP, ("v", v), v_compress=one.v_compress, v_window=one.v_window)
    k_cache, v_cache, k_raw = caches[0], caches[1], caches[4]
    check_rows(_OP, 4, k_cache=k_cache, k_window_cache=one.k_window_cache)
    check_rows(_OP, 4, v_cache=v_cache, v_window_cache=one.v_window_cache, v_raw=one.v_raw)
    check_like(_OP, ("k_cache", k_cache), k_window_cache=one.k_window_cache)
    check_like(_OP, ("v_cache", v_cache), v_window_cache=one.v_window_cache)
    needed = (k_raw.shape[0], kernel_size, *v.shape[1:])
    if one.v_raw.shape != needed:
        rule = f"v_raw must be {needed}"
        fail(_OP, rule, tuple(one.v_raw.shape), "give it k_raw's places and v's heads")
    return one


def check(
    inputs: tuple[Any, ...],
    types: tuple[str, str],
    kernel_size: int,
    kernel_stride: int,
    block_table: Tensor | None,
    pe_v: Tensor | None,
) -> None:
    """The contract of `cache_append`; `types` are those of keys and values."""
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
    check_compress_weights(_OP, k, w_k, pe, types[0], kernel_size)
    check_compress_weights(_OP, v, w_v, pe_v, types[1], kernel_size)
    hidden_size(w_k, w_v)
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
    named = dict(zip(CACHES, caches, strict=True))
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
            rule = f"{CACHES[one]} and {CACHES[other]} must have one length"
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
