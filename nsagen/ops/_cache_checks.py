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
from nsagen.ops.reference.compress import Weight, weight_of
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


def check_append(call: Any) -> None:
    """The contract of `cache_append`."""
    q, k, v, table = call.q, call.k, call.v, call.block_table
    check_attention(_OP, q, k, v)
    if q.shape[0] != k.shape[0]:
        came = f"{q.shape[0]} and {k.shape[0]}"
        fail(_OP, "q and k must have the same rows", came, "pass one a row")
    check_tables(_OP, q, call.cos, call.sin)
    size, stride = call.kernel_size, call.kernel_stride
    check_windows(_OP, size, stride)
    w_k, w_v = weight_of(call.w_k, call.w_k2), weight_of(call.w_v, call.w_v2)
    check_compress_weights(_OP, k, w_k, call.pe, call.compress_type, size)
    v_type = call.v_compress_type or call.compress_type
    check_compress_weights(_OP, v, w_v, call.pe_v, v_type, size)
    hidden_size(w_k, w_v)
    check_indices(_OP, q, (q.shape[0],), positions=call.positions, slots=call.slots)
    if table is not None:
        check_table(_OP, q, table)
    caches = {name: getattr(call, name) for name in CACHES}
    _check_caches(k, v, caches, size, stride, table)
    tokens = min(capacity_of(call.k_cache, table), call.cos.shape[0])
    check_places(_OP, call.positions, call.slots, tokens, call.k_cache, table)
    names = SeparateKV.__annotations__
    own = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    if own and len(own) < len(names):
        rule = "the branches' own rows and caches must come together"
        fail(_OP, rule, f"{len(own)} of {len(names)}", "pass a SeparateKV")
    if own:
        needed = (call.k_raw.shape[0], size, *v.shape[1:])
        _check_separate(SeparateKV(**own), k, v, call.k_cache, call.v_cache, needed)


def _check_separate(
    one: SeparateKV,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    needed: tuple[int, ...],
) -> None:
    """The branches' own tensors have the shapes of those that they replace."""
    check_rows(_OP, k=k, k_compress=one.k_compress, k_window=one.k_window)
    check_rows(_OP, v=v, v_compress=one.v_compress, v_window=one.v_window)
    check_like(_OP, ("k", k), k_compress=one.k_compress, k_window=one.k_window)
    check_like(_OP, ("v", v), v_compress=one.v_compress, v_window=one.v_window)
    check_rows(_OP, 4, k_cache=k_cache, k_window_cache=one.k_window_cache)
    check_rows(_OP, 4, v_cache=v_cache, v_window_cache=one.v_window_cache, v_raw=one.v_raw)
    check_like(_OP, ("k_cache", k_cache), k_window_cache=one.k_window_cache)
    check_like(_OP, ("v_cache", v_cache), v_window_cache=one.v_window_cache)
    if one.v_raw.shape != needed:
        rule = f"v_raw must be {needed}"
        fail(_OP, rule, tuple(one.v_raw.shape), "give it k_raw's places and v's heads")


def _check_caches(
    k: Tensor,
    v: Tensor,
    caches: dict[str, Tensor],
    kernel_size: int,
    kernel_stride: int,
    block_table: Tensor | None,
) -> None:
    """Five caches [slots or pages, length, HK, dim] of k's and v's dtype, heads and sizes."""
    check_rows(_OP, 4, **caches)
    k_cache, k_raw = caches["k_cache"], caches["k_raw"]
    for name, cache in caches.items():
        like = v if name in ("v_cache", "cv_cache") else k
        places = k_cache.shape[0]
        if block_table is not None and name == "k_raw":
            places = block_table.shape[0]
        if cache.shape[2:] != like.shape[1:] or cache.shape[0] != places:
            rule = f"{name} must be [{places}, length, {like.shape[1]}, {like.shape[2]}]"
            fail(_OP, rule, tuple(cache.shape), "allocate an NSACache")
        if cache.dtype != k.dtype or cache.device != k.device:
            came = f"{cache.dtype} on {cache.device}"
            fail(_OP, f"{name} must be {k.dtype} on {k.device}", came, "allocate it so")
    for one, other in (("k_cache", "v_cache"), ("ck_cache", "cv_cache")):
        if caches[one].shape[1] != caches[other].shape[1]:
            came = f"{caches[one].shape[1]} and {caches[other].shape[1]}"
            rule = f"{one} and {other} must have one length"
            fail(_OP, rule, came, "allocate an NSACache")
    if k_raw.shape[1] != kernel_size:
        rule = "k_raw must hold kernel_size tokens"
        fail(_OP, rule, f"{k_raw.shape[1]} for kernel_size {kernel_size}", "resize it")
    if block_table is None:
        return
    page_size, windows = k_cache.shape[1], caches["ck_cache"].shape[1]
    check_page_size(_OP, page_size, "kernel_stride", kernel_stride)
    if windows * kernel_stride != page_size:
        rule = f"ck_cache must have {page_size // kernel_stride} windows a page"
        fail(_OP, rule, windows, "give each page of tokens one of the windows that start in it")
