"""Calls of pool_append: rows with new tokens, a cache of compressed keys that changes in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.caches import Pages, RandomCaches, allow_steps
from nsagen.core.workload import Workload
from nsagen.ops import reference

NEW_TOKENS = 19
"""Of each row: some complete several windows, some none."""


def make_case(
    workload: Workload,
    sizes: Sizes,
    device: torch.device | str,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
) -> Case:
    """Rows at the positions `sizes.seqlens` (-1: idle), in permuted slots of larger caches.

    Keys past a row's position and those of spare slots are NaN, and the compressed cache holds
    infinity: a kernel that reads or writes another entry shows it.
    """
    size, stride = int(workload.kernel_size), int(workload.kernel_stride)
    dim, heads = int(workload.head_dim), sizes.kv_heads
    random = RandomCaches(workload, device, seed)
    slots = random.slots(len(sizes.seqlens))
    lengths = [position + 1 for position in sizes.seqlens]
    k_cache = random.cache(slots, lengths, sizes.capacity, heads, dim)
    windows = max(1, -(-sizes.capacity // stride))
    ck_cache = poisoned((len(slots) + 1, windows, heads, dim), random.dtype, device)
    pages = Pages.of(slots, lengths, sizes)
    if pages:
        k_cache, ck_cache = pages.hold(k_cache), pages.hold(ck_cache, stride)
    ck_cache.fill_(math.inf)
    (k_cache, ck_cache), scales = random.stored(k_cache, ck_cache)
    outputs = {"ck_cache": ck_cache}
    if scales:
        outputs = {
            "ck_cache": ck_cache.view(torch.int8),
            "ck_scale": scales[1].nan_to_num_(math.inf),
        }
    before = ck_cache.clone()
    scale_before = [scale.clone() for scale in scales[1:]]
    table = pages.table.to(device) if pages else None
    positions = torch.tensor(sizes.seqlens, dtype=torch.int32).to(device)
    slots = slots.to(device)

    def expected() -> dict[str, Tensor]:
        after = {"ck_cache": before.clone() if scales else before.double()}
        wide = k_cache if scales else k_cache.double()
        more: dict[str, Tensor] = {}
        if scales:
            after["ck_scale"] = scale_before[0].clone()
            more = {"k_scale": scales[0].double(), "ck_scale": after["ck_scale"]}
        reference.pool_append(
            *(wide, after["ck_cache"], positions, slots),
            kernel_size=size,
            kernel_stride=stride,
            new_tokens=new_tokens,
            block_table=table,
            **more,
        )
        if scales:
            allow_steps(after, {"ck_cache": ck_cache, "ck_scale": scales[1]}, *after)
        return after

    entry = dim * k_cache.element_size() + (4 if scales else 0)
    made = sum(min(-(-new_tokens // stride), max(0, n - size) // stride + 1) for n in lengths)
    return Case(
        args=(k_cache, ck_cache, positions, slots, new_tokens, table, *scales),
        outputs=outputs,
        expected=expected,
        cost=Cost(0.0, float(made * (size + 1) * heads * entry)),
    )
