"""Rows of a cache of a narrow dtype, as kernels of whole passes read them."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import check_places
from nsagen.ops._checks import check_tensors, fail
from nsagen.ops._derive import op_of
from nsagen.ops._launch import Launch, key_of, narrow_kernel
from nsagen.runtime import Dispatcher


def load_rows(
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    dtype: torch.dtype,
    *,
    block_table: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Read and widen rows of a cache of torch.float8_e4m3fn or torch.int8, from slots or pages.

    Kernels of a step read narrow caches themselves, once. Those of a chunk read each key for many
    queries, packed, so this gathers and widens what they see in one pass, without another copy.

    Args:
        cache: [slots, max_length, H, D].
        scale: float32 [slots, max_length, H].
        positions: int32 [R], of the tokens to read; -1: an idle row, which is 0.
        slots: int32 [R], each token's place in the cache.
        dtype: of what is returned: bfloat16, float32 or float64 (by the reference), which hold the
            values exactly, as scales are powers of two.
        block_table: int32 [slots, max_pages], or None. With it the cache is in pages, [pages,
            page_size, H, D]: token t of a slot lies in page block_table[slot, t // page_size].
        dispatcher: as in the other ops; the kernel is the same in all packages.

    Returns:
        [R, H, D], contiguous.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    return _load_rows(cache, scale, positions, slots, dtype, block_table, key_of(dispatcher))


def _check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        rule = "dtype must be bfloat16, float32 or float64, which hold a cache's values"
        fail(op, rule, dtype, "pass one of them")


def _kernel(cache: Tensor, dtype: torch.dtype) -> Launch | None:
    return None if dtype == torch.float64 else narrow_kernel("launch_load_rows", cache)


_load_rows = op_of(
    "load_rows",
    reference.load_rows,
    returns="x",
    allocate=lambda cache, positions, dtype: cache.new_empty(
        (positions.shape[0], *cache.shape[2:]), dtype=dtype
    ),
    check=(check_tensors, check_places, _check_dtype),
    kernel=_kernel,
    launch="x cache scale positions slots block_table",
)
