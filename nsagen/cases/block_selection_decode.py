"""Calls of block selection's decode pass: one new token a row, a cache of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.block_selection import NEAR_PRODUCTS, allow_near, rule_of, scoring_of
from nsagen.cases.caches import Pages, RandomCaches
from nsagen.core.workload import Workload
from nsagen.ops.reference._attend import scores_of
from nsagen.ops.reference.block_selection import scores_of_blocks
from nsagen.ops.reference.quantize import first_values


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Rows at the positions `sizes.seqlens` (-1: idle), in permuted slots of a larger cache.

    Everything that a row must not read is NaN: windows that end after its token, and spare slots.
    If float32 cannot tell blocks apart, either may be chosen, as in the forward pass.
    """
    rule, scoring = rule_of(workload), scoring_of(workload)
    size, stride, dim = rule.kernel_size, rule.kernel_stride, int(workload.head_dim)
    rows, key_heads = len(sizes.seqlens), sizes.kv_heads
    heads = key_heads * int(workload.gqa_ratio)
    windows = [max(0, (position + 1 - size) // stride + 1) for position in sizes.seqlens]
    capacity = max(1, (sizes.capacity - size) // stride + 1)

    random = RandomCaches(workload, device, seed)
    slots = random.slots(rows)
    q = random.normal(rows, heads, dim)
    k_cache = random.cache(slots, windows, capacity, key_heads, dim)
    pages = Pages.of(slots, [position + 1 for position in sizes.seqlens], sizes)
    if pages:
        k_cache = pages.hold(k_cache, stride)
    (k_cache,), scales = random.stored(k_cache)
    k_scale = scales[0] if scales else None
    table = pages.table.to(device) if pages else None
    positions = torch.tensor(sizes.seqlens, dtype=torch.int32).to(device)
    selections = scoring.rows(heads, key_heads)
    topk_idx = poisoned((selections, rows, rule.topk), torch.int32, device)
    scale = dim**-0.5

    def expected() -> dict[str, Tensor]:
        chosen = torch.full_like(topk_idx, -1)
        for row, (position, slot) in enumerate(zip(sizes.seqlens, slots.tolist(), strict=True)):
            if position < 0:
                continue
            wide = None if k_scale is None else k_scale.double()
            keys = first_values(k_cache, wide, table, slot, windows[row]).double()
            one, at = slice(row, row + 1), torch.full((1,), position, device=q.device)
            query, lse, least = q[one].double(), None, 1e-34
            if scoring.score_norm == "softmax":
                lse = scores_of(query, keys, scale).logsumexp(-1).permute(2, 0, 1).flatten(1)
            elif windows[row]:
                norms = query.norm(dim=-1).max() * keys.norm(dim=-1).max()
                least = NEAR_PRODUCTS * norms.item()
            blocks = position // rule.block_size + 1
            scores = scores_of_blocks(query, keys, lse, at, blocks, scale, rule, scoring)
            chosen[:, one] = allow_near(topk_idx[:, one], scores, at, rule, least)
        return {"topk_idx": chosen}

    seen, entry = sum(windows), dim * k_cache.element_size() + (4 if scales else 0)
    cost = Cost(
        flops=2.0 * seen * heads * dim,
        bytes=seen * key_heads * entry + q.nbytes + topk_idx.nbytes,
    )
    args = (q, k_cache, positions, slots.to(device), topk_idx, scale, table)
    return Case((*args, *scales), {"topk_idx": topk_idx}, expected, cost)
