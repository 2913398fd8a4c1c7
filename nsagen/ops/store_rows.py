"""Rows of new tokens in a cache of a narrow dtype: keys after rope, values, index keys."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import check_places
from nsagen.ops._checks import check_tensors
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, narrow_kernel
from nsagen.runtime import Dispatcher


def store_rows(
    x: Tensor,
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    block_table: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> None:
    """Write rows to a cache of torch.float8_e4m3fn or torch.int8, each head with a scale.

    What is stored of a token depends on that token alone, so it does not matter how many come at
    once. `cache_append` does this for NSA, whose keys it turns and compresses first.

    Args:
        x: [R, H, D], bfloat16 or float32: rounded once. See `reference.quantize`.
        cache: [slots, max_length, H, D]; changed.
        scale: float32 [slots, max_length, H]; changed.
        positions: int32 [R], of each row's token; -1: an idle row, which is skipped. No two rows
            have the same place.
        slots: int32 [R], each row's place in the cache.
        block_table: int32 [slots, max_pages], or None. With it the cache is in pages, [pages,
            page_size, H, D]: token t of a slot lies in page block_table[slot, t // page_size].
        dispatcher: as in the other ops; the kernel is the same in all packages.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    if torch.is_grad_enabled():
        x = x.detach()
    _store_rows(x, cache, scale, positions, slots, block_table, key_of(dispatcher))


_store_rows = op_of(
    "store_rows",
    reference.store_rows,
    returns="",
    allocate=lambda: None,
    check=(check_tensors, check_places),
    kernel=lambda cache: narrow_kernel("launch_store_rows", cache),
    launch="x cache scale positions slots block_table",
    mutates="cache scale",
)
