"""Rows of a cache in a narrow dtype, each with a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.core.workload import CACHE_DTYPES
from nsagen.ops.reference._pages import first_entries


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [..., dim] as numbers of a narrow dtype, and the scale of each.

    A scale is the least power of two that brings its row into the dtype's range. So nothing but a
    row's own values decides what is stored of it, and numbers times scales are exact in bfloat16.

    Args:
        x: of any float dtype; rounded once, to the nearest and ties to even.
        dtype: one of CACHE_DTYPES.

    Returns:
        the numbers, in x's shape, and the scales, float32 [...]; NaN for a row that isn't finite.
    """
    limit = CACHE_DTYPES[str(dtype).removeprefix("torch.")]
    largest = x.abs().amax(-1).to(torch.float32)
    bits = (largest * (1.0 / limit)).view(torch.int32).to(torch.int64)
    bits = ((bits + 0x7FFFFF) & 0x7F800000).clamp(min=0x00800000)  # the next power of two
    scale = bits.to(torch.int32).view(torch.float32)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    rows = x / scale[..., None]
    if not dtype.is_floating_point:
        rows = rows.nan_to_num(0.0).round()
    return rows.to(dtype), scale


def dequantize(rows: Tensor, scale: Tensor) -> Tensor:
    """The values of quantized rows [..., dim], in the dtype of their scales [...]."""
    return rows.to(scale.dtype) * scale[..., None]


def round_trip(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache gives back of x [..., dim], in x's dtype."""
    return dequantize(*quantize(x, dtype)).to(x.dtype)


def first_values(
    cache: Tensor, scale: Tensor | None, block_table: Tensor | None, slot: int, count: int
) -> Tensor:
    """The values of a slot's first entries, [count, HK, dim]."""
    entries = first_entries(cache, block_table, slot, count)
    if scale is None:
        return entries
    return dequantize(entries, first_entries(scale, block_table, slot, count))


def store(cache: Tensor, scale: Tensor | None, place: tuple[int, int], rows: Tensor) -> None:
    """Write the heads [HK, dim] of a token or window."""
    if scale is None:
        cache[place] = rows.to(cache.dtype)
    else:
        cache[place], scale[place] = quantize(rows, cache.dtype)
