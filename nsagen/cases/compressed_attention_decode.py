"""Calls of compressed attention's decode pass: one new token a row, compressed caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.block_selection import allow_near, rule_of
from nsagen.cases.caches import Pages, RandomCaches
from nsagen.core.workload import Workload
from nsagen.ops import reference
from nsagen.ops.reference import dequantize
from nsagen.ops.reference._attend import scores_of
from nsagen.ops.reference._pages import first_entries
from nsagen.ops.reference.block_selection import scores_of_blocks

_STATICS = ("kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks")


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Rows at the positions `sizes.seqlens` (-1: idle), in permuted slots of larger caches.

    Everything that a row must not read is NaN: windows that end after its token, and spare slots.
    If float32 cannot tell blocks apart, either may be chosen, as in the forward pass.
    """
    params: dict[str, Any] = workload.named()
    size, stride = params["kernel_size"], params["kernel_stride"]
    head_dim, v_dim = params["head_dim"], params["v_head_dim"]
    rows, kv_heads = len(sizes.seqlens), sizes.kv_heads
    heads = kv_heads * params["gqa_ratio"]
    windows = [max(0, (position + 1 - size) // stride + 1) for position in sizes.seqlens]
    capacity = max(1, (sizes.capacity - size) // stride + 1)

    random = RandomCaches(workload, device, seed)
    slots = random.slots(rows)
    q = random.normal(rows, heads, head_dim)
    ck_cache = random.cache(slots, windows, capacity, kv_heads, head_dim)
    cv_cache = random.cache(slots, windows, capacity, kv_heads, v_dim)
    pages = Pages.of(slots, [position + 1 for position in sizes.seqlens], sizes)
    if pages:
        ck_cache, cv_cache = (pages.hold(cache, stride) for cache in (ck_cache, cv_cache))
    (ck_cache, cv_cache), scales = random.stored(ck_cache, cv_cache)
    table = pages.table.to(device) if pages else None
    positions = torch.tensor(sizes.seqlens, dtype=torch.int32).to(device)
    o = poisoned((rows, heads, v_dim), q.dtype, device)
    topk_idx = poisoned((kv_heads, rows, params["topk"]), torch.int32, device)
    scale = head_dim**-0.5
    inputs = (q, ck_cache, cv_cache, positions, slots.to(device))

    def expected() -> dict[str, Tensor]:
        statics = {name: params[name] for name in _STATICS}
        keys, values = ck_cache.double(), cv_cache.double()
        if scales:
            keys, values = map(dequantize, (keys, values), (scale.double() for scale in scales))
        out, chosen = reference.compressed_attention_decode(
            *(q.double(), keys, values),
            *inputs[3:],
            **statics,
            softmax_scale=scale,
            block_table=table,
        )
        for row, (position, slot) in enumerate(zip(sizes.seqlens, slots.tolist(), strict=True)):
            if position >= 0:
                seen = first_entries(keys, table, slot, windows[row])
                one, at = slice(row, row + 1), torch.full((1,), position, device=q.device)
                scores = _scores(workload, q[one].double(), seen, at, scale)
                chosen[:, one] = allow_near(topk_idx[:, one], scores, at, rule_of(workload))
        return {"o": out, "topk_idx": chosen}

    entry = (head_dim + v_dim) * ck_cache.element_size() + (8 if scales else 0)
    cost = _cost(sum(windows), rows, kv_heads, params, q.element_size(), entry)
    args = (*inputs, o, topk_idx, scale, table, *scales)
    return Case(args, {"o": o, "topk_idx": topk_idx}, expected, cost)


def _scores(workload: Workload, q: Tensor, keys: Tensor, at: Tensor, scale: float) -> Tensor:
    """The share of a token's probability in the blocks up to its own, [HK, 1, blocks]."""
    rule = rule_of(workload)
    lse = scores_of(q, keys, scale).logsumexp(-1).permute(2, 0, 1).flatten(1)
    blocks = int(at) // rule.block_size + 1
    return scores_of_blocks(q, keys, lse, at, blocks, scale, rule)


def _cost(
    windows: int, rows: int, kv_heads: int, params: dict[str, Any], element: int, entry: int
) -> Cost:
    """Of windows that take `entry` bytes a head, and rows."""
    dims, heads = params["head_dim"] + params["v_head_dim"], kv_heads * params["gqa_ratio"]
    moved = windows * kv_heads * entry + rows * heads * dims * element
    return Cost(2.0 * windows * heads * dims, moved + 4.0 * kv_heads * rows * params["topk"])
