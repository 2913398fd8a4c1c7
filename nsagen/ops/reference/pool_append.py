"""Compressed keys of a cache: means of the windows that new tokens complete."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops.reference._attend import upcast
from nsagen.ops.reference._checks import check_windows
from nsagen.ops.reference._pages import capacity_of, place_of
from nsagen.ops.reference.quantize import first_values, store


@torch.no_grad()
def pool_append(
    k_cache: Tensor,
    ck_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    new_tokens: int = 1,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    ck_scale: Tensor | None = None,
) -> None:
    """ck_cache[slot, i] = the mean of k_cache[slot, i s : i s + l], for each new window i.

    New are the windows that end at one of the last `new_tokens` tokens up to a row's position. A
    window that ck_cache has no room for is left out.

    Args:
        k_cache: [slots, max_length, HK, D], keys as attention reads them.
        ck_cache: [slots, max_windows, HK, D]; changed.
        positions: int32 [R], position of each row's newest token; -1: an idle row.
        slots: int32 [R], each row's place in the caches.
        kernel_size: tokens of a window, l.
        kernel_stride: tokens between the starts of two windows, s.
        new_tokens: tokens that were appended to each row, or more than that.
        block_table: int32 [slots, max_pages], or None. With it the caches are [pages, page_size,
            HK, D] and [pages, page_size // kernel_stride, HK, D].
        k_scale, ck_scale: of the rows of caches of a narrow dtype; ck_scale is changed. See
            `quantize`.
    """
    check_windows("pool_append", kernel_size, kernel_stride)
    room = capacity_of(ck_cache, block_table)
    for position, slot in zip(positions.tolist(), slots.tolist(), strict=True):
        ended = max(0, position + 1 - kernel_size + kernel_stride) // kernel_stride
        before = max(0, position + 1 - new_tokens - kernel_size + kernel_stride) // kernel_stride
        length = max(0, position + 1)
        (keys,) = upcast(first_values(k_cache, k_scale, block_table, slot, length))
        for window in range(before, min(ended, room)):
            first = window * kernel_stride
            mean = keys[first : first + kernel_size].mean(0)
            store(ck_cache, ck_scale, place_of(ck_cache, block_table, slot, window), mean)
