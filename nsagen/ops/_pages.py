"""Paged caches: the contract of a block table and of the pages that it names."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops._checks import check_indices, check_range, fail, values_are_read
from nsagen.ops.reference._pages import capacity_of

__all__ = ["capacity_of", "check_page_size", "check_places", "check_table"]


def check_table(op: str, like: Tensor, block_table: Tensor) -> None:
    """int32 [slots, max_pages], contiguous, on the device of `like`."""
    if block_table.ndim != 2:
        rule = "block_table must have shape [slots, max_pages]"
        fail(op, rule, tuple(block_table.shape), "give each slot a row of page numbers")
    check_indices(op, like, tuple(block_table.shape), block_table=block_table)


def check_page_size(op: str, page_size: int, multiple_of: str, unit: int) -> None:
    """A page holds a whole number of units: no unit spans two pages."""
    if page_size < 1 or page_size % unit:
        rule = f"the page size must be a positive multiple of {multiple_of}"
        came = f"{page_size} tokens and {multiple_of} {unit}"
        fail(
            op, rule, came, f"allocate pages of e.g. {max(1, -(-page_size // unit)) * unit} tokens"
        )


def check_places(
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
