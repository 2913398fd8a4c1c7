"""Rows of a cache of a narrow dtype, widened."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def load_rows(
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    dtype: torch.dtype,
    *,
    block_table: Tensor | None = None,
) -> Tensor:
    """x[r] = cache[slots[r], positions[r]] * scale[slots[r], positions[r]].

    Args:
        cache: [slots, max_length, H, D], of one of CACHE_DTYPES.
        scale: float32 [slots, max_length, H].
        positions: int32 [R]; -1: an idle row, which is 0.
        slots: int32 [R], each row's place in the cache.
        dtype: of what is returned; exact in bfloat16 and wider, as scales are powers of two.
        block_table: int32 [slots, max_pages], or None. With it the cache is [pages, page_size, H,
            D].

    Returns:
        [R, H, D].
    """
    live = positions >= 0
    slot, position = slots.where(live, 0).long(), positions.where(live, 0).long()
    if block_table is not None:
        slot, position = block_table[slot, position // cache.shape[1]], position % cache.shape[1]
    # As integers, which PyTorch indexes everywhere.
    rows = cache.view(torch.int8)[slot, position].view(cache.dtype)
    x = rows.to(dtype) * scale[slot, position].to(dtype)[..., None]
    return x.masked_fill(~live[:, None, None], 0.0)
