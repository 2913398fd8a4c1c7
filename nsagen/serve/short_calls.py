"""Requests that need every kernel which a server's requests will need, in little time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from nsagen.core.errors import CapacityError
from nsagen.model.drafts import MOST_DRAFTED, Drafter
from nsagen.model.serving import ContinuousBatch

SHORT = 16
"""Tokens of a prompt beside others."""


def make_short_calls(batch: ContinuousBatch, drafts: bool = False) -> None:
    """Run prompts of each size up to a pass and longer, and steps of each number of rows.

    Steps are launched one by one. The batch, which must be empty, is empty afterwards.

    Args:
        drafts: whether steps verify several tokens, too.
    """
    captures, batch.cuda_graph = batch.cuda_graph, False
    try:
        for sizes in _sizes(batch):
            for most in (0, 1, 3, MOST_DRAFTED) if drafts and sizes[0] <= SHORT else (0,):
                with suppress(CapacityError):  # of pages: that many will never run at once
                    for row, size in enumerate(sizes):
                        new = min(2 + most, batch.limits.longest - size)
                        drafter = _guessing(most)
                        batch.add(_prompt(row, size), max_new_tokens=new, drafter=drafter)
                for _ in batch.run(prompts_first=True):
                    pass
                batch.forget_prefixes()
    finally:
        batch.clear()
        batch.cuda_graph = captures


def _sizes(batch: ContinuousBatch) -> list[list[int]]:
    """Tokens of prompts that run at once."""
    limits = batch.limits
    longest = max(1, limits.longest - 2 - MOST_DRAFTED)
    a_pass = min(limits.prefill_chunk_size or longest, longest)
    alone = [[size] for size in _doubling(SHORT, a_pass)]
    if longest > a_pass:  # and a part behind what the cache holds
        more = (SHORT, a_pass // 4, a_pass)
        alone += [[min(longest, a_pass + size)] for size in more]
    short = min(SHORT, longest)
    return [*alone, *([short] * rows for rows in _doubling(1, limits.max_batch_size))]


def _prompt(row: int, size: int) -> list[int]:
    """Of another beginning than others that run at once, so that none are shared."""
    return [row % 16, row // 16 % 16, *[0] * size][:size]


def _doubling(first: int, last: int) -> Sequence[int]:
    """Powers of two from `first` on below `last`, and that."""
    return [*(n for n in (first << i for i in range(32)) if n < last), last]


def _guessing(most: int) -> Callable[[], Drafter] | None:
    """What makes a drafter of always so many guesses."""
    if not most:
        return None
    return lambda: lambda tokens, limit: [0] * min(most, limit)
