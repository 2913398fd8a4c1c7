"""The contracts of ops on caches, with pages or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.core.workload import CACHE_DTYPES
from nsagen.ops._checks import (
    check_attention,
    check_compress_weights,
    check_indices,
    check_keys,
    check_like,
    check_range,
    check_rows,
    fail,
    shapes,
    values_are_read,
)
from nsagen.ops.reference._checks import check_windows
from nsagen.ops.reference._pages import capacity_of
from nsagen.ops.reference.compress import Weight, weight_of
from nsagen.ops.rope import check_tables
from nsagen.ops.separate import SeparateKV

_OP = "cache_append"
CACHES = ("k_cache", "v_cache", "ck_cache", "cv_cache")


def check_scales(op: str, x: Tensor | None, **caches: tuple[Tensor, Tensor | None]) -> None:
    """Quantized caches and the scales of their rows, unless none has any.

    Args:
        x: in the dtype to compute in; None where that is float32, and no two scales have one
            layout.
        caches: by name, each and its scale; every two after each other have one layout of scales.
    """
    given = {name: scale for name, (_, scale) in caches.items() if scale is not None}
    if not given:
        return
    if len(given) < len(caches):
        rule = f"{', '.join(caches)} must all have scales, or none of them"
        fail(op, rule, f"scales of {', '.join(given)}", "pass the rest, or none")
    first = next(iter(caches.values()))[0]
    device = first.device if x is None else x.device
    if x is not None and x.dtype == torch.float16:
        rule = "quantized caches need bfloat16 or float32 beside them, which hold their values"
        fail(op, rule, x.dtype, "use bfloat16, or caches of float16")
    for name, (cache, scale) in caches.items():
        assert scale is not None
        came = f"{cache.dtype} on {cache.device}"
        if str(cache.dtype).removeprefix("torch.") not in CACHE_DTYPES or cache.device != device:
            rule = f"{name} with a scale must be {' or '.join(CACHE_DTYPES)} on {device}"
            fail(op, rule, came, "allocate it so, or pass no scales")
        if cache.dtype != first.dtype:
            fail(op, f"{', '.join(caches)} must share one dtype", came, "allocate them alike")
        if cache.ndim != 4 or cache.shape[-1] == 0 or cache.stride(-1) != 1:
            came = f"{tuple(cache.shape)}, strides {tuple(cache.stride())}"
            rule = f"{name} must have 4 dimensions, the last one contiguous"
            fail(op, rule, came, "allocate an NSACache")
        if scale.dtype != torch.float32 or scale.device != device:
            came = f"{scale.dtype} on {scale.device}"
            fail(op, f"{name}'s scale must be float32 on {device}", came, "allocate it so")
        if scale.shape != cache.shape[:3]:
            rule = f"{name}'s scale must be {tuple(cache.shape[:3])}"
            fail(op, rule, tuple(scale.shape), "give each row of the cache one")
    scales = [] if x is None else list(given.items())
    for (one, scale), (other, second) in zip(scales[::2], scales[1::2], strict=False):
        if scale.stride() != second.stride():
            came = f"strides {scale.stride()} and {second.stride()}"
            names = " and ".join(name.replace("cache", "scale") for name in (one, other))
            fail(op, f"{names} must have one layout", came, "make both new")


def check_cached(
    op: str,
    q: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    ck_cache: Tensor | None = None,
    cv_cache: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    ck_scale: Tensor | None = None,
    cv_scale: Tensor | None = None,
) -> None:
    """q [R, HQ, D], caches [slots or pages, length, HK, D | Dv] of its dtype or with scales, int32
    indices. Which caches there are depends on the op: keys, and values or none."""
    pairs = {"k_cache": (k_cache, k_scale), "v_cache": (v_cache, v_scale)}
    pairs |= {"ck_cache": (ck_cache, ck_scale), "cv_cache": (cv_cache, cv_scale)}
    caches = {name: cache for name, (cache, _) in pairs.items() if cache is not None}
    quantized = any(pairs[name][1] is not None for name in caches)
    check_rows(op, q=q)
    if quantized:
        check_scales(op, q, **{name: (cache, pairs[name][1]) for name, cache in caches.items()})
    else:
        check_rows(op, 4, **caches)
    keys, *values = caches.values()
    check_keys(op, q, keys)
    if values and keys.shape[:3] != values[0].shape[:3]:
        came = shapes({"keys": keys, "values": values[0]})
        fail(op, "caches must agree in slots, length and heads", came, "allocate an NSACache")
    if not quantized and (q.dtype != keys.dtype or q.device != keys.device):
        rule = f"{' and '.join(caches)} must be {q.dtype} on {q.device}, as q is"
        fail(op, rule, f"{keys.dtype} on {keys.device}", "allocate them so")
    check_rows_of_slots(op, q, positions, slots, block_table)


def check_window_caches(
    op: str, k_cache: Tensor, v_cache: Tensor, k_window_cache: Tensor, v_window_cache: Tensor
) -> None:
    """The sliding branch's own caches are like the selected branch's."""
    check_rows(op, 4, k_cache=k_cache, k_window_cache=k_window_cache)
    check_rows(op, 4, v_cache=v_cache, v_window_cache=v_window_cache)
    check_like(op, ("k_cache", k_cache), k_window_cache=k_window_cache)
    check_like(op, ("v_cache", v_cache), v_window_cache=v_window_cache)


def check_rows_of_slots(
    op: str,
    x: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None,
    rows: int | None = None,
) -> None:
    """int32 [rows], those of x by default, and [slots, max_pages], contiguous, on x's device."""
    rows = x.shape[0] if rows is None else rows
    check_indices(op, x, (rows,), positions=positions, slots=slots)
    if block_table is None:
        return
    if block_table.ndim != 2:
        rule = "block_table must have shape [slots, max_pages]"
        fail(op, rule, tuple(block_table.shape), "give each slot a row of page numbers")
    check_indices(op, x, tuple(block_table.shape), block_table=block_table)


def check_places(
    op: str,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None,
    k_cache: Tensor,
    block_size: int = 1,
) -> None:
    """Pages hold whole blocks. If values are read: a row's position and slot are in the cache."""
    if block_table is not None:
        check_page_size(op, k_cache.shape[1], "block_size", block_size)
    _check_places(op, positions, slots, capacity_of(k_cache, block_table), k_cache, block_table)


def check_places_of_windows(
    op: str,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    ck_cache: Tensor | None = None,
    k_cache: Tensor | None = None,
) -> None:
    """The same of a cache of compressed keys: the last token may be past the last window."""
    cache = k_cache if ck_cache is None else ck_cache
    assert cache is not None
    if block_table is not None:
        check_page_size(op, cache.shape[1] * kernel_stride, "block_size", block_size)
    tokens = capacity_of(cache, block_table) * kernel_stride + kernel_size - 1
    _check_places(op, positions, slots, tokens, cache, block_table)


def check_page_size(op: str, page_size: int, multiple_of: str, unit: int) -> None:
    """A page holds a whole number of units: no unit spans two pages."""
    if page_size < 1 or page_size % unit:
        rule = f"the page size must be a positive multiple of {multiple_of}"
        came = f"{page_size} tokens and {multiple_of} {unit}"
        fail(
            op, rule, came, f"allocate pages of e.g. {max(1, -(-page_size // unit)) * unit} tokens"
        )


def _check_places(
    op: str,
    positions: Tensor,
    slots: Tensor,
    tokens: int,
    cache: Tensor,
    block_table: Tensor | None,
) -> None:
    """If values are read: a row's position is -1 or less than `tokens`, and its slot exists.

    Elsewhere a row that breaks this reads and writes what is not its own.
    """
    check_range(op, "positions", positions, -1, tokens)
    if values_are_read(positions):
        places = cache if block_table is None else block_table
        check_range(op, "slots", slots[positions >= 0], 0, places.shape[0])


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
    check_rows_of_slots(_OP, q, call.positions, call.slots, table)
    caches = {name: getattr(call, name) for name in CACHES}
    scales = {name: getattr(call, name.replace("cache", "scale")) for name in CACHES}
    check_scales(_OP, k, **{name: (caches[name], scales[name]) for name in CACHES})
    quantized = call.k_scale is not None
    _check_caches(k, v, caches | {"k_raw": call.k_raw}, size, stride, table, quantized)
    tokens = min(capacity_of(call.k_cache, table), call.cos.shape[0])
    _check_places(_OP, call.positions, call.slots, tokens, call.k_cache, table)
    needed = (call.k_raw.shape[0], size, *v.shape[1:])
    if quantized:
        _check_values_ring(call.v_raw, v, needed)
        return
    names = SeparateKV.__annotations__
    own = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    if own and len(own) < len(names):
        rule = "the branches' own rows and caches must come together"
        fail(_OP, rule, f"{len(own)} of {len(names)}", "pass a SeparateKV")
    if own:
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
    check_window_caches(_OP, k_cache, v_cache, one.k_window_cache, one.v_window_cache)
    check_rows(_OP, 4, v_cache=v_cache, v_raw=one.v_raw)
    if one.v_raw.shape != needed:
        rule = f"v_raw must be {needed}"
        fail(_OP, rule, tuple(one.v_raw.shape), "give it k_raw's places and v's heads")


def _check_values_ring(ring: Tensor | None, v: Tensor, needed: tuple[int, ...]) -> None:
    """The last values in their own dtype, beside quantized caches."""
    if ring is None or ring.shape != needed or ring.dtype != v.dtype or ring.device != v.device:
        came = None if ring is None else f"{tuple(ring.shape)} {ring.dtype} on {ring.device}"
        rule = f"quantized caches need v_raw, {needed} {v.dtype} on {v.device}"
        fail(_OP, rule, came, "allocate an NSACache with that cache_dtype")


def _check_caches(
    k: Tensor,
    v: Tensor,
    caches: dict[str, Tensor],
    kernel_size: int,
    kernel_stride: int,
    block_table: Tensor | None,
    quantized: bool,
) -> None:
    """Five caches [slots or pages, length, HK, dim] of k's and v's heads and sizes, and of their
    dtype; if quantized, only the last one is."""
    k_cache, k_raw = caches["k_cache"], caches["k_raw"]
    plain = {"k_raw": k_raw} if quantized else caches
    check_rows(_OP, 4, **plain)
    for name, cache in caches.items():
        like = v if name in ("v_cache", "cv_cache") else k
        places = k_cache.shape[0]
        if block_table is not None and name == "k_raw":
            places = block_table.shape[0]
        if cache.shape[2:] != like.shape[1:] or cache.shape[0] != places:
            rule = f"{name} must be [{places}, length, {like.shape[1]}, {like.shape[2]}]"
            fail(_OP, rule, tuple(cache.shape), "allocate an NSACache")
        if name in plain and (cache.dtype != k.dtype or cache.device != k.device):
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
