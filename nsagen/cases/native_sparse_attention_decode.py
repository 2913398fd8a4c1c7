"""Calls of Native Sparse Attention's decode pass: selected and sliding branches, and the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.caches import Pages, RandomCaches
from nsagen.cases.selected_attention import in_any_order
from nsagen.core.workload import Workload
from nsagen.ops import reference
from nsagen.ops.reference import dequantize


def make_case(
    workload: Workload,
    sizes: Sizes,
    device: torch.device | str,
    seed: int = 0,
    own_window: bool = False,
) -> Case:
    """Rows at the positions `sizes.seqlens` (-1: idle), in permuted slots of larger caches.

    Each row selects its first and last block and random others. Everything that a row must not
    read is NaN: tokens after its own, and spare slots.

    Args:
        own_window: whether the sliding branch has its own caches.
    """
    params: dict[str, Any] = workload.named()
    head_dim, v_dim = params["head_dim"], params["v_head_dim"]
    rows, kv_heads = len(sizes.seqlens), sizes.kv_heads
    heads = kv_heads * params["gqa_ratio"]
    lengths = [position + 1 for position in sizes.seqlens]

    random = RandomCaches(workload, device, seed)
    slots = random.slots(rows)
    q = random.normal(rows, heads, head_dim)
    caches = [
        random.cache(slots, lengths, sizes.capacity, kv_heads, dim)
        for dim in (head_dim, v_dim) * (2 if own_window else 1)
    ]
    pages = Pages.of(slots, lengths, sizes)
    if pages:
        caches = [pages.hold(cache) for cache in caches]
    caches, scales = random.stored(*caches)
    k_cache, v_cache, *own = caches
    table = pages.table.to(device) if pages else None
    topk_idx = random_blocks(sizes, params["block_size"], params["topk"], seed)
    if sizes.any_order:
        topk_idx = in_any_order(topk_idx, seed)
    positions = torch.tensor(sizes.seqlens, dtype=torch.int32)
    o_compressed = random.normal(rows, heads, v_dim)
    gate = torch.sigmoid(random.normal(rows, heads, 3))
    o = poisoned((rows, heads, v_dim), q.dtype, device)
    scale = head_dim**-0.5
    indices = tuple(x.to(device) for x in (topk_idx, positions, slots))
    inputs = (q, k_cache, v_cache, *indices, o_compressed, gate)

    def expected() -> dict[str, Tensor]:
        wide: list[Any] = [x.double() if x.is_floating_point() else x for x in inputs]
        if scales:
            wide[1:3] = map(dequantize, (k_cache, v_cache), (scale.double() for scale in scales))
        names = ("block_size", "window_size")
        statics = {name: params[name] for name in names}
        names = ("k_window_cache", "v_window_cache")
        own_wide = {name: cache.double() for name, cache in zip(names, own, strict=False)}
        out = reference.native_sparse_attention_decode(
            *wide, **statics, **own_wide, softmax_scale=scale, block_table=table
        )
        return {"o": out}

    cost = _cost(sizes, params, q.element_size(), k_cache.element_size())
    more = [*(own or (None, None)), *scales] if scales else own
    return Case((*inputs, o, scale, table, *more), {"o": o}, expected, cost)


def random_blocks(sizes: Sizes, block_size: int, topk: int, seed: int) -> Tensor:
    """int32 [HK, R, topk] on the CPU: ascending blocks of each row, then -1."""
    generator = torch.Generator().manual_seed(seed)
    topk_idx = torch.full((sizes.kv_heads, len(sizes.seqlens), topk), -1, dtype=torch.int32)
    for row, position in enumerate(sizes.seqlens):
        blocks = -(-(position + 1) // block_size)
        rank = torch.rand(sizes.kv_heads, blocks, generator=generator)
        rank[:, :1] = rank[:, -1:] = 2.0
        chosen = rank.topk(min(topk, blocks)).indices.sort().values
        topk_idx[:, row, : chosen.shape[1]] = chosen.to(torch.int32)
    return topk_idx


def _cost(sizes: Sizes, params: dict[str, Any], element: int, cached: int) -> Cost:
    dims, group = params["head_dim"] + params["v_head_dim"], params["gqa_ratio"]
    selected, window = params["topk"] * params["block_size"], params["window_size"]
    tokens = sum(min(p + 1, selected) + min(p + 1, window) for p in sizes.seqlens)
    row_heads = len(sizes.seqlens) * sizes.kv_heads * group
    row_bytes = row_heads * (dims + params["v_head_dim"] + 3) * element
    flops = 2.0 * tokens * sizes.kv_heads * group * dims
    indices = 4.0 * len(sizes.seqlens) * sizes.kv_heads * params["topk"]
    entry = dims * cached + (8 if params["cache_dtype"] else 0)  # with both scales
    return Cost(flops, tokens * sizes.kv_heads * entry + row_bytes + indices)
