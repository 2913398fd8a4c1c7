"""The run-time sizes of a call; separate from the cases, which need torch."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.core.workload import Workload


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


def sizes_for(workload: Workload) -> Sizes:
    """Run-time sizes that reach a workload's edges: empty and short sequences, and a long one.

    The long sequence has more blocks than topk and more tokens than the window. Block indices are
    written in every way that callers may write them.
    """
    params = dict(workload.params)

    def number(name: str, default: int) -> int:
        return int(params.get(name, default))

    block, window = number("block_size", 16), number("window_size", 16)
    kernel = number("kernel_size", 8)
    long = max(block * (number("topk", 4) + 2), window + block, 4 * kernel) + 5
    if workload.pass_ == "decode":
        return Sizes(seqlens=(0, kernel - 1, long), capacity=long + 1, any_order=True)
    return Sizes(seqlens=(0, kernel - 1, long, 1, block + 1), any_order=True)
