"""The run-time sizes of a call; separate from the cases, which need torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from nsagen.core.workload import Workload

T = TypeVar("T", int, float)

TOPK = 16
"""Blocks of a list in NSA's paper (arXiv 2502.11089, section 4.1)."""


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
        topk: blocks of a list, where the call decides it and not the workload.
        queries: forward and backward: a call's queries are at most this many last tokens of each
            sequence; None: all tokens.
    """

    seqlens: tuple[int, ...]
    kv_heads: int = 2
    capacity: int = 256
    page_size: int | None = None
    any_order: bool = False
    topk: int = TOPK
    queries: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.seqlens)

    @property
    def rows(self) -> tuple[int, ...]:
        """Queries of each sequence."""
        most = self.queries
        return self.seqlens if most is None else tuple(min(n, most) for n in self.seqlens)

    def over_queries(self, up_to: Callable[[int], T]) -> T | int:
        """The sum over all queries, where a sequence's first n tokens have up_to(n) together."""
        ends = zip(self.seqlens, self.rows, strict=True)
        return sum(up_to(length) - up_to(length - rows) for length, rows in ends)


def takes_lists(workload: Workload) -> bool:
    """Whether a workload's calls decide how many blocks a list has."""
    listed = workload.op in ("selected_attention", "index_loss")
    return listed and workload.pass_ != "decode"


def sizes_for(workload: Workload, topk: int = TOPK) -> Sizes:
    """Run-time sizes that reach a workload's edges: empty and short sequences, and a long one.

    The long sequence has more blocks than topk and more tokens than the window. Block indices are
    written in every way that callers may write them.

    Args:
        topk: blocks of a list, where calls decide it.
    """
    params = dict(workload.params)

    def number(name: str, default: int) -> int:
        return int(params.get(name, default))

    block, window = number("block_size", 16), number("window_size", 16)
    kernel = number("kernel_size", 8)
    listed = takes_lists(workload)
    most = topk if listed else number("topk", 4)
    long = max(block * (most + 2), window + block, 4 * kernel) + 5
    if workload.pass_ == "decode":
        return Sizes(seqlens=(0, kernel - 1, long), capacity=long + 1, any_order=True)
    sizes = Sizes(seqlens=(0, kernel - 1, long, 1, block + 1), any_order=True)
    return replace(sizes, topk=topk) if listed else sizes
