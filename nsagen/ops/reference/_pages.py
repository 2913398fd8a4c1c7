"""Caches in pages: where a slot's entries lie.

A contiguous cache is [slots, length, ...]. A paged one is [pages, rows a page, ...]: entry i of a
slot lies in page block_table[slot, i // rows] at row i % rows.
"""

from __future__ import annotations

from torch import Tensor


def place_of(cache: Tensor, block_table: Tensor | None, slot: int, index: int) -> tuple[int, int]:
    """Where the cache holds a slot's entry: its first two indices."""
    if block_table is None:
        return slot, index
    page, row = divmod(index, cache.shape[1])
    return int(block_table[slot, page]), row


def first_entries(cache: Tensor, block_table: Tensor | None, slot: int, count: int) -> Tensor:
    """A slot's first entries, [count, HK, dim]."""
    if block_table is None:
        return cache[slot, :count]
    pages = -(-count // cache.shape[1])
    return cache[block_table[slot, :pages].long()].flatten(0, 1)[:count]


def capacity_of(cache: Tensor, block_table: Tensor | None) -> int:
    """Entries that a slot of a cache can hold: [slots, length, ...], or [pages, rows, ...]."""
    return cache.shape[1] if block_table is None else block_table.shape[1] * cache.shape[1]
