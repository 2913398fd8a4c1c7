"""Where rows lie in caches, with pages or without."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops._checks import check_range, fail, values_are_read
from nsagen.ops.reference._pages import capacity_of


def check_places(
    op: str,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None,
    k_cache: Tensor | None = None,
    cache: Tensor | None = None,
    block_size: int = 1,
) -> None:
    """Pages hold whole blocks. If values are read: a row's position and slot are in the cache."""
    keys = cache if k_cache is None else k_cache
    assert keys is not None
    if block_table is not None:
        check_page_size(op, keys.shape[1], "block_size", block_size)
    check_rows_in(op, positions, slots, capacity_of(keys, block_table), keys, block_table)


def check_places_of_windows(
    op: str,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    ck_cache: Tensor | None = None,
    k_cache: Tensor | None = None,
) -> None:
    """The same of a cache of compressed keys: the last token may be past the last window."""
    cache = k_cache if ck_cache is None else ck_cache
    assert cache is not None
    if block_table is not None:
        check_page_size(op, cache.shape[1] * kernel_stride, "block_size", block_size)
    tokens = capacity_of(cache, block_table) * kernel_stride + kernel_size - 1
    check_rows_in(op, positions, slots, tokens, cache, block_table)


def check_rows_in(
    op: str,
    positions: Tensor,
    slots: Tensor,
    tokens: int,
    cache: Tensor,
    block_table: Tensor | None,
) -> None:
    """If values are read: a row's position is -1 or less than `tokens`, and its slot exists.

    Elsewhere a row that breaks this reads and writes what is not its own.
    """
    check_range(op, "positions", positions, -1, tokens)
    if values_are_read(positions):
        places = cache if block_table is None else block_table
        check_range(op, "slots", slots[positions >= 0], 0, places.shape[0])


def check_page_size(op: str, page_size: int, multiple_of: str, unit: int) -> None:
    """A page holds a whole number of units: no unit spans two pages."""
    if page_size < 1 or page_size % unit:
        rule = f"the page size must be a positive multiple of {multiple_of}"
        came = f"{page_size} tokens and {multiple_of} {unit}"
        fail(
            op, rule, came, f"allocate pages of e.g. {max(1, -(-page_size // unit)) * unit} tokens"
        )


def check_pages_of_windows(
    op: str, k_cache: Tensor, ck_cache: Tensor, block_table: Tensor | None, kernel_stride: int
) -> None:
    """A page of compressed keys holds the windows that start in a page of tokens."""
    if block_table is None:
        return
    page_size, windows = k_cache.shape[1], ck_cache.shape[1]
    check_page_size(op, page_size, "kernel_stride", kernel_stride)
    if windows * kernel_stride != page_size:
        rule = f"ck_cache must have {page_size // kernel_stride} windows a page"
        fail(op, rule, windows, "give each page of tokens one of the windows that start in it")
