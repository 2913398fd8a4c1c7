"""Calls of cache_append: one new token a row, caches that change in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.caches import Pages, RandomCaches, allow_steps
from nsagen.cases.compress import compress_weight
from nsagen.core.workload import Workload
from nsagen.ops import CacheScales, SeparateKV, reference
from nsagen.ops.reference.compress import Weight, layers_of

_CACHES = ("k_cache", "v_cache", "ck_cache", "cv_cache", "k_raw")
_SCALED = ("k_cache", "v_cache", "ck_cache", "cv_cache")
_SCALES = ("k_scale", "v_scale", "ck_scale", "cv_scale")
_OWN_CACHES = ("v_raw", "k_window_cache", "v_window_cache")


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Rows at the positions `sizes.seqlens` (-1: idle), in permuted slots of larger caches.

    The caches hold infinity except for the earlier tokens of windows that rows complete. A kernel
    that reads another entry spreads it, and errors count only what is written.
    """
    params: dict[str, Any] = workload.named()
    dim, v_dim = params["head_dim"], params["v_head_dim"]
    rows, kv_heads = len(sizes.seqlens), sizes.kv_heads
    random = RandomCaches(workload, device, seed)
    slots = random.slots(rows)

    q = random.normal(rows, kv_heads * params["gqa_ratio"], dim)
    k, v = random.normal(rows, kv_heads, dim), random.normal(rows, kv_heads, v_dim)
    w_k, w_v, pe, pe_v = _weights(params, kv_heads, random)
    own = [random.normal(*x.shape) for x in (k, v, k, v)] if _is_separate(params) else []
    caches = _caches(sizes, params, slots, random)
    pages = Pages.of(slots, [position + 1 for position in sizes.seqlens], sizes)
    if pages:
        units = {"k_raw": 0, "v_raw": 0, "ck_cache": params["kernel_stride"]}
        units["cv_cache"] = units["ck_cache"]
        caches = {
            name: pages.hold(x, units.get(name, 1), math.inf) if units.get(name, 1) else x
            for name, x in caches.items()
        }
    if params["cache_dtype"]:
        rows_of, scales_of = random.stored(*(caches[name] for name in _SCALED))
        caches |= dict(zip(_SCALED, rows_of, strict=True))
        unread = (scale.nan_to_num_(nan=math.inf) for scale in scales_of)
        caches |= dict(zip(_SCALES, unread, strict=True))
    table = pages.table.to(device) if pages else None
    before = {name: cache.clone() for name, cache in caches.items()}
    q_out = poisoned(tuple(q.shape), q.dtype, device)
    positions = torch.tensor(sizes.seqlens, dtype=torch.int32).to(device)
    inputs = (q, k, v, *_tables(dim, sizes.capacity, device))

    def expected() -> dict[str, Tensor]:
        kept = (*_SCALED, *_SCALES) if params["cache_dtype"] else ()  # in their own dtypes
        after = {n: x.clone() if n in kept else x.double() for n, x in before.items()}
        wide: list[Any] = [_double(x) for x in (*inputs, w_k, w_v, pe)]
        separate = None
        if own:
            separate = SeparateKV(*(x.double() for x in own), *(after[n] for n in _OWN_CACHES))
        scales = CacheScales(**{n: after[n] for n in (*_SCALES, "v_raw")}) if kept else None
        names = ("compress_type", "v_compress_type", "kernel_size", "kernel_stride")
        out = reference.cache_append(
            *(*wide, positions, slots, *(after[name] for name in _CACHES)),
            **{name: params[name] for name in names},
            pe_v=_double(pe_v),
            block_table=table,
            separate=separate,
            scales=scales,
        )
        for name, scale in zip(_SCALED, _SCALES, strict=True):
            if kept:
                allow_steps(after, caches, name, scale)
        return {"q_out": out, **after}

    (w_k1, w_k2), (w_v1, w_v2) = layers_of(w_k), layers_of(w_v)
    args = (*inputs, w_k1, w_v1, pe, positions, slots.to(device))
    args = (*args, *(caches[name] for name in _CACHES), q_out, table)
    own_tensors = (*(own or (None,) * 4), *(caches.get(n) for n in _OWN_CACHES))
    more = (w_k2, w_v2, pe_v, *own_tensors)
    if params["cache_dtype"]:
        more = (*more, *(caches[name] for name in _SCALES))
    if any(x is not None for x in more):
        args = (*args, *more)
    integers = {n: caches[n].view(torch.int8) for n in _SCALED if params["cache_dtype"]}
    return Case(
        args=args,
        outputs={"q_out": q_out, **caches, **integers},
        expected=expected,
        cost=_cost(sizes, params, q.element_size()),
    )


def _is_separate(params: dict[str, Any]) -> bool:
    return params["branch_kv"] == "separate"


def _double(x: Any) -> Any:
    """In float64: a tensor, an mlp's two tensors, or None."""
    if isinstance(x, tuple):
        return tuple(one.double() for one in x)
    return None if x is None else x.double()


def _weights(
    params: dict[str, Any], kv_heads: int, random: RandomCaches
) -> tuple[Weight, Weight, Tensor | None, Tensor | None]:
    """(w_k, w_v, pe, pe_v)."""
    size, dims = params["kernel_size"], (params["head_dim"], params["v_head_dim"])
    kinds = (params["compress_type"], params["v_compress_type"])
    w_k, w_v = (
        compress_weight(kind, kv_heads, size, dim, random.normal, params["mlp_hidden"])
        for kind, dim in zip(kinds, dims, strict=True)
    )
    pe, pe_v = (
        random.normal(kv_heads, size, dim) if params[name] else None
        for name, dim in zip(("with_pe", "v_with_pe"), dims, strict=True)
    )
    return w_k, w_v, pe, pe_v


def _tables(dim: int, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [length, dim // 2] of rope's usual angles."""
    inverse = 10000.0 ** -(torch.arange(dim // 2, device=device) / (dim // 2))
    angles = torch.arange(length, device=device)[:, None] * inverse
    return angles.cos(), angles.sin()


def _completes(position: int, params: dict[str, Any]) -> bool:
    ended = position + 1 - params["kernel_size"]
    return ended >= 0 and ended % params["kernel_stride"] == 0


def _caches(
    sizes: Sizes, params: dict[str, Any], slots: Tensor, random: RandomCaches
) -> dict[str, Tensor]:
    """The five caches, or eight with those of separate branches, contiguous."""
    size, stride = params["kernel_size"], params["kernel_stride"]
    dim, v_dim = params["head_dim"], params["v_head_dim"]
    places, heads, length = len(slots) + 1, sizes.kv_heads, sizes.capacity
    windows = max(1, (length - size) // stride + 1)
    shapes = {"k_cache": (length, dim), "v_cache": (length, v_dim)}
    shapes |= {"ck_cache": (windows, dim), "cv_cache": (windows, v_dim), "k_raw": (size, dim)}
    if _is_separate(params):
        shapes |= {"v_raw": (size, v_dim), "k_window_cache": (length, dim)}
        shapes["v_window_cache"] = (length, v_dim)
    caches = {
        name: torch.full(
            (places, entries, heads, d), math.inf, dtype=random.dtype, device=random.device
        )
        for name, (entries, d) in shapes.items()
    }
    if params["cache_dtype"]:
        caches["v_raw"] = torch.full_like(caches["k_raw"][..., :1], math.inf).repeat(1, 1, 1, v_dim)
    for slot, position in zip(slots.tolist(), sizes.seqlens, strict=True):
        if not _completes(position, params):
            continue
        rings = [caches[name] for name in ("k_raw", "v_raw") if name in caches]
        for ring in rings:
            ring[slot] = random.normal(*ring.shape[1:])
            ring[slot, position % size] = math.inf
        if len(rings) == 1:
            first = position + 1 - size
            caches["v_cache"][slot, first:position] = random.normal(size - 1, heads, v_dim)
    return caches


def _cost(sizes: Sizes, params: dict[str, Any], element: int) -> Cost:
    """Every row's token in and out; a window's tokens and weights if a row completes one."""
    dim, v_dim, size = params["head_dim"], params["v_head_dim"], params["kernel_size"]
    heads, live = sizes.kv_heads, sum(position >= 0 for position in sizes.seqlens)
    tokens = 6 * (dim + v_dim) if _is_separate(params) else 3 * dim + 2 * v_dim
    if params["cache_dtype"]:  # rows of one byte an element in place of T's; and v_raw
        tokens += v_dim - (dim + v_dim) * (1 - 1 / element)
    moved = live * heads * (2 * params["gqa_ratio"] * dim + tokens)
    windows = sum(_completes(position, params) for position in sizes.seqlens)
    moved += windows * heads * size * (dim + v_dim)
    hidden = params["mlp_hidden"]
    weights = 0
    for kind, d in ((params["compress_type"], dim), (params["v_compress_type"], v_dim)):
        weights += {"linear": size * d * d, "mlp": size * d * hidden + hidden * d}.get(kind, 0)
    moved += heads * weights if windows else 0
    return Cost(2.0 * windows * heads * weights, float(moved * element))
