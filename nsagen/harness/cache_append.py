"""Calls of cache_append: one new token a row, caches that change in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nsagen.harness.base import Case, Cost, Sizes, poisoned
from nsagen.harness.caches import Pages, RandomCaches
from nsagen.harness.compress import compress_weight
from nsagen.ops import reference
from nsagen.workload import Workload

_CACHES = ("k_cache", "v_cache", "ck_cache", "cv_cache", "k_raw")


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Rows at the positions `sizes.seqlens` (-1: idle), in permuted slots of larger caches.

    The caches hold infinity but for the tokens of windows that rows complete, the new ones
    excepted: whoever reads another entry spreads it, and errors count only what is written.
    """
    params: dict[str, Any] = dict(workload.params)
    dim, v_dim = params["head_dim"], params["v_head_dim"]
    rows, kv_heads = len(sizes.seqlens), sizes.kv_heads
    random = RandomCaches(workload, device, seed)
    slots = random.slots(rows)

    q = random.normal(rows, kv_heads * params["gqa_ratio"], dim)
    k, v = random.normal(rows, kv_heads, dim), random.normal(rows, kv_heads, v_dim)
    weights = _weights(params, kv_heads, random)
    caches = _caches(sizes, params, slots, random)
    pages = Pages.of(slots, [position + 1 for position in sizes.seqlens], sizes)
    if pages:
        units = (1, 1, params["kernel_stride"], params["kernel_stride"])
        paged = (pages.hold(x, unit, math.inf) for x, unit in zip(caches, units, strict=False))
        caches = (*paged, caches[4])
    table = pages.table.to(device) if pages else None
    before = [cache.clone() for cache in caches]
    q_out = poisoned(tuple(q.shape), q.dtype, device)
    positions = torch.tensor(sizes.seqlens, dtype=torch.int32).to(device)
    inputs = (q, k, v, *_tables(dim, sizes.capacity, device), *weights)

    def expected() -> dict[str, Tensor]:
        after = [cache.double() for cache in before]
        wide: list[Any] = [None if x is None else x.double() for x in inputs]
        wide += [positions, slots, *after]
        names = ("compress_type", "kernel_size", "kernel_stride")
        statics = {name: params[name] for name in names}
        out = reference.cache_append(*wide, **statics, block_table=table)
        return {"q_out": out, **dict(zip(_CACHES, after, strict=True))}

    return Case(
        args=(*inputs, positions, slots.to(device), *caches, q_out, table),
        outputs={"q_out": q_out, **dict(zip(_CACHES, caches, strict=True))},
        expected=expected,
        cost=_cost(sizes, params, q.element_size()),
    )


def _weights(
    params: dict[str, Any], kv_heads: int, random: RandomCaches
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(w_k, w_v, pe)."""
    kind, size = params["compress_type"], params["kernel_size"]
    dims = (params["head_dim"], params["v_head_dim"])
    w_k, w_v = (compress_weight(kind, kv_heads, size, dim, random.normal) for dim in dims)
    pe = random.normal(kv_heads, size, dims[0]) if params["with_pe"] else None
    return w_k, w_v, pe


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
) -> tuple[Tensor, ...]:
    """The five caches, contiguous."""
    size, stride = params["kernel_size"], params["kernel_stride"]
    places, heads = len(slots) + 1, sizes.kv_heads
    windows = max(1, (sizes.capacity - size) // stride + 1)
    lengths = (sizes.capacity, sizes.capacity, windows, windows, size)
    dims = [params[name] for name in ("head_dim", "v_head_dim") * 2 + ("head_dim",)]
    caches = tuple(
        torch.full((places, length, heads, dim), math.inf, dtype=random.dtype, device=random.device)
        for length, dim in zip(lengths, dims, strict=True)
    )
    _, values, _, _, k_raw = caches
    for slot, position in zip(slots.tolist(), sizes.seqlens, strict=True):
        if _completes(position, params):
            k_raw[slot] = random.normal(size, heads, dims[0])
            k_raw[slot, position % size] = math.inf
            first = position + 1 - size
            values[slot, first:position] = random.normal(size - 1, heads, dims[1])
    return caches


def _cost(sizes: Sizes, params: dict[str, Any], element: int) -> Cost:
    """Every row's token in and out; a window's tokens and weights where a row completes one."""
    dim, v_dim, size = params["head_dim"], params["v_head_dim"], params["kernel_size"]
    heads, live = sizes.kv_heads, sum(position >= 0 for position in sizes.seqlens)
    moved = live * heads * (2 * params["gqa_ratio"] * dim + 3 * dim + 2 * v_dim)
    windows = sum(_completes(position, params) for position in sizes.seqlens)
    moved += windows * heads * size * (dim + v_dim)
    squares = dim * dim + v_dim * v_dim if params["compress_type"] == "linear" else 0
    moved += heads * size * squares if windows else 0
    return Cost(2.0 * windows * heads * size * squares, float(moved * element))
