"""The run-time sizes of a call; separate from the cases, which need torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The run-time sizes of a call.

    Attributes:
        seqlens: tokens of each packed sequence; in decode, the position of each row's new token.
        kv_heads: key/value heads HK.
        capacity: decode only: tokens that the cache can hold for each sequence.
        page_size: decode only: tokens of a cache page; None if a sequence's tokens are contiguous.
        any_order: whether block indices are written in every way that their contract allows: in
            any order, repeated, between entries that name no block.
    """

    seqlens: tuple[int, ...]
    kv_heads: int = 2
    capacity: int = 256
    page_size: int | None = None
    any_order: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.seqlens)
