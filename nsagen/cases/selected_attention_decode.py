"""Calls of selected attention's decode pass: one new token a row, caches of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.caches import Pages, RandomCaches
from nsagen.cases.native_sparse_attention_decode import random_blocks
from nsagen.cases.selected_attention import in_any_order
from nsagen.core.workload import Workload
from nsagen.ops import reference


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Rows at the positions `sizes.seqlens` (-1: idle), in permuted slots of larger caches.

    Each row selects its first and last block and random others. Everything that a row must not
    read is NaN: tokens after its own, and spare slots.
    """
    params: dict[str, Any] = workload.named()
    head_dim, v_dim, block_size = (params[n] for n in ("head_dim", "v_head_dim", "block_size"))
    rows, kv_heads = len(sizes.seqlens), sizes.kv_heads
    heads = kv_heads * params["gqa_ratio"]
    lengths = [position + 1 for position in sizes.seqlens]

    random = RandomCaches(workload, device, seed)
    slots = random.slots(rows)
    q = random.normal(rows, heads, head_dim)
    caches = [
        random.cache(slots, lengths, sizes.capacity, kv_heads, dim) for dim in (head_dim, v_dim)
    ]
    pages = Pages.of(slots, lengths, sizes)
    if pages:
        caches = [pages.hold(cache) for cache in caches]
    (k_cache, v_cache), scales = random.stored(*caches)
    table = pages.table.to(device) if pages else None
    topk_idx = random_blocks(sizes, block_size, params["topk"], seed)
    if sizes.any_order:
        topk_idx = in_any_order(topk_idx, seed)
    positions = torch.tensor(sizes.seqlens, dtype=torch.int32)
    o = poisoned((rows, heads, v_dim), q.dtype, device)
    scale = head_dim**-0.5
    indices = tuple(x.to(device) for x in (topk_idx, positions, slots))

    def expected() -> dict[str, Tensor]:
        wide = (x if scales and x is not q else x.double() for x in (q, k_cache, v_cache))
        names = ("k_scale", "v_scale")[: len(scales)]
        own = {name: x.double() for name, x in zip(names, scales, strict=True)}
        out = reference.selected_attention_decode(
            *wide, *indices, block_size=block_size, softmax_scale=scale, block_table=table, **own
        )
        return {"o": out}

    tokens = sum(min(length, params["topk"] * block_size) for length in lengths)
    dims = head_dim + v_dim
    entry = dims * k_cache.element_size() + 4 * len(scales)
    cost = Cost(
        flops=2.0 * tokens * heads * dims,
        bytes=tokens * kv_heads * entry + q.nbytes + o.nbytes + topk_idx.nbytes,
    )
    args = (q, k_cache, v_cache, *indices, o, scale, table, *scales)
    return Case(args, {"o": o}, expected, cost)
