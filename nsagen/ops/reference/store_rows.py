"""New tokens' rows in a cache of a narrow dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops.reference.quantize import quantize


@torch.no_grad()
def store_rows(
    x: Tensor,
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """cache[slots[r], positions[r]], scale[slots[r], positions[r]] = quantize(x[r]).

    Args:
        x: [R, H, D].
        cache: [slots, max_length, H, D], of one of CACHE_DTYPES; changed.
        scale: float32 [slots, max_length, H]; changed.
        positions: int32 [R]; -1: an idle row, which is skipped.
        slots: int32 [R], each row's place in the cache.
        block_table: int32 [slots, max_pages], or None. With it the cache is [pages, page_size, H,
            D].
    """
    live = positions >= 0
    slot, position = slots[live].long(), positions[live].long()
    if block_table is not None:
        slot, position = block_table[slot, position // cache.shape[1]], position % cache.shape[1]
    rows, scales = quantize(x[live], cache.dtype)
    # As integers, which PyTorch indexes everywhere.
    cache.view(torch.int8)[slot, position] = rows.view(torch.int8)
    scale[slot, position] = scales
