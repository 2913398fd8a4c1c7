"""Prefill: which tokens of which sequences a pass computes, and where they go in a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

Index = tuple[Tensor, Tensor]
"""Two int64 tensors that index the first two dimensions of a cache."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence; the cache already holds the ones before them.

    Attributes:
        slot: the sequence's place in the cache.
        start: position of the first token.
        length: tokens.
        reused: where the sequence began to compute for itself: the cache holds all windows that
            start before, but perhaps no key before rope. See `settled`.
    """

    slot: int
    start: int
    length: int
    reused: int = 0

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length


def settled(cached: int, windows: tuple[int, int] | None) -> int:
    """How much of a sequence never changes again once `cached` of its tokens are in a cache.

    All windows that start before that position are complete. So a sequence that has the cache up
    to there can compute the rest, whatever it is, and needs no earlier key before rope.

    Args:
        windows: kernel_size and kernel_stride; None where nothing is compressed.

    Returns:
        a multiple of kernel_stride.
    """
    if windows is None:
        return cached
    size, stride = windows
    return max(0, cached - size + stride) // stride * stride


class Places(Protocol):
    """What a cache says about where things lie in it."""

    device: torch.device

    @property
    def windows(self) -> tuple[int, int] | None: ...  # kernel_size, kernel_stride

    @property
    def paged(self) -> bool: ...
    def token_index(self, slot: Tensor, position: Tensor) -> Index: ...
    def window_index(self, slot: Tensor, window: Tensor) -> Index: ...


@dataclass(frozen=True)
class Context:
    """What the queries of a pass see, packed: all entries of their sequences up to the last one.

    Attributes:
        lengths: entries of each sequence.
        cu_seqlens: int32 [batch+1], where each sequence's entries start.
        index: where they lie in a cache.
        view: (slot, entries) if they are contiguous, so that nothing need be copied.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    index: Index
    view: tuple[int, int] | None

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """`index` in int32, positions first: as `ops.load_rows` takes it."""
        slots, positions = (x.to(torch.int32) for x in self.index)
        return positions, slots

    def of(self, cache: Tensor) -> Tensor:
        """The entries [T, HK, dim]."""
        if self.view is not None:
            slot, entries = self.view
            return cache[slot, :entries]
        return cache[self.index]


@dataclass(frozen=True)
class WindowRows:
    """The compression windows that the tokens of a pass complete.

    A window may start with tokens of earlier passes: keys before rope that the cache kept for
    this, and values. They come before the sequence's new tokens in what is compressed.

    Attributes:
        carried: places in k_raw of those earlier tokens; None without any.
        carried_values: the same tokens in the cache of values.
        order: int64, rows of [carried, new] that bring both into the sequences' order.
        cu_seqlens: int32 [batch+1], where each sequence starts in what is compressed.
        index: where the windows go in the cache.
        positions: int32 [M], of the windows' first tokens.
        kept: int64, rows of the new tokens whose keys the cache keeps for windows to come.
        raw: where they go in k_raw.
        ends: int32 [batch+1], where each sequence's windows start if it had no earlier ones.
        context: all windows that the queries see; None if the pass makes them all.
    """

    carried: Index | None
    carried_values: Index | None
    order: Tensor | None
    cu_seqlens: Tensor
    index: Index
    positions: Tensor
    kept: Tensor
    raw: Index
    ends: Tensor
    context: Context | None

    def with_carried(self, new: Tensor, cache: Tensor, index: Index | None) -> Tensor:
        """The tokens to compress: those of earlier passes, then the new ones."""
        if index is None or self.order is None:
            return new
        return torch.cat((cache[index], new))[self.order]


@dataclass(frozen=True)
class PrefillRows:
    """The layout of a pass over packed pieces of sequences, built once for all layers.

    Attributes:
        lengths: tokens of each piece.
        cu_seqlens: int32 [batch+1], where each piece starts.
        positions: int32 [N], of each token in its sequence.
        index: where the tokens go in a cache.
        q_start: int32 [batch], position of each piece's first token; None if all are 0.
        context: all tokens that the queries see; None if the pass holds them all.
        windows: the same for compressed keys and values, if there are any.
        fused: whether layers run as fused products; see `nsagen.model.fused`.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    positions: Tensor
    index: Index
    q_start: Tensor | None
    context: Context | None
    windows: WindowRows | None
    fused: bool = False

    @classmethod
    def of(cls, pieces: Sequence[Piece], cache: Places, fused: bool = False) -> PrefillRows:
        """Lay out a pass. The host knows the lengths, so the device is never asked."""
        device = cache.device
        lengths = [piece.length for piece in pieces]
        owner, position = _runs([piece.start for piece in pieces], lengths, device)
        slots = _numbers([piece.slot for piece in pieces], device)
        continued = any(piece.start for piece in pieces)
        return cls(
            lengths=tuple(lengths),
            cu_seqlens=_offsets(lengths, device),
            positions=position.to(torch.int32),
            index=cache.token_index(slots[owner], position),
            q_start=_offsets([p.start for p in pieces], device, running=False)
            if continued
            else None,
            context=_context(pieces, [p.end for p in pieces], cache, cache.token_index)
            if continued
            else None,
            windows=None if cache.windows is None else _window_rows(pieces, cache, continued),
            fused=fused,
        )


@dataclass(frozen=True)
class DecodeRows:
    """One new token of each of several sequences, or a few, after those that a cache holds.

    Attributes:
        positions: int32 [R], of the tokens; -1: an idle row.
        slots: int32 [R], the sequences' slots in the cache.
        fused: whether layers run as fused products; see `nsagen.model.fused`.
        appended: int32 [R] each, the positions of the rows that go into the cache together, and -1
            for the others; in this order.
    """

    positions: Tensor
    slots: Tensor
    fused: bool = False
    appended: tuple[Tensor, ...] = ()

    @classmethod
    def several(
        cls,
        positions: Tensor,
        slots: Tensor,
        windows: tuple[int, int] | None,
        fused: bool = False,
    ) -> DecodeRows:
        """A few new tokens of each sequence.

        Args:
            positions: int32 [n, S], consecutive down a column; -1 for idle rows, below the others.
            slots: int32 [S], all different.
            windows: the cache's kernel_size, at least n, and kernel_stride; None for dense ones.
        """
        rows = cls(positions.flatten(), slots.repeat(positions.shape[0]), fused)
        if windows is None:
            return rows
        order, count = _append_order(positions, *windows)
        turns = tuple(positions.masked_fill(order != i, -1).flatten() for i in range(count))
        return replace(rows, appended=turns)

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [R+1]: each row is a sequence of one token."""
        rows = self.positions.shape[0] + 1
        return torch.arange(rows, dtype=torch.int32, device=self.positions.device)


def _append_order(positions: Tensor, size: int, stride: int) -> tuple[Tensor, int]:
    """In which of how many turns each token is appended.

    A token that completes a window reads those before it from the cache, and those after it
    overwrite the oldest keys before rope. So it has a turn of its own, between the others.

    Returns:
        int [n, S], and the number of turns: as few as for any positions.
    """
    tokens = positions.shape[0]
    turns = 2 * -(-tokens // stride) + 1
    if tokens <= turns:
        each = torch.arange(tokens, device=positions.device)
        return each[:, None].expand_as(positions), tokens
    last = [(positions + shift - size) // stride for shift in (0, 1)]  # windows complete by then
    return 2 * (last[1] - last[0][:1]) - (last[1] - last[0]), turns


CachedRows = PrefillRows | DecodeRows
"""What a pass with a cache computes."""


def _window_rows(pieces: Sequence[Piece], cache: Places, continued: bool) -> WindowRows:
    assert cache.windows is not None
    size, stride = cache.windows
    device = cache.device
    lengths = [piece.length for piece in pieces]
    slots = _numbers([piece.slot for piece in pieces], device)
    before, after = (
        [max(0, (t - size) // stride + 1) for t in ends]
        for ends in ([p.start for p in pieces], [p.end for p in pieces])
    )
    before = [max(b, p.reused // stride) for b, p in zip(before, pieces, strict=True)]
    made = [max(0, b - a) for a, b in zip(before, after, strict=True)]
    owner, window = _runs(before, made, device)

    # The first window to complete starts at most kernel_size - 1 tokens before the piece.
    first = [window * stride for window in before]
    carry = [piece.start - token for piece, token in zip(pieces, first, strict=True)]
    carried = carried_values = order = None
    if any(carry):
        carried_owner, token = _runs(first, carry, device)
        carried = (slots[carried_owner], token % size)
        carried_values = cache.token_index(slots[carried_owner], token)
        old, new = _starts(carry), [sum(carry) + start for start in _starts(lengths)]
        order = _runs(_alternate(old, new), _alternate(carry, lengths), device)[1]

    tails = [min(size, length) for length in lengths]
    last = [start + n - t for start, n, t in zip(_starts(lengths), lengths, tails, strict=True)]
    position = [piece.end - t for piece, t in zip(pieces, tails, strict=True)]
    tail_owner, kept_position = _runs(position, tails, device)
    return WindowRows(
        carried=carried,
        carried_values=carried_values,
        order=order,
        cu_seqlens=_offsets([c + n for c, n in zip(carry, lengths, strict=True)], device),
        index=cache.window_index(slots[owner], window),
        positions=(window * stride).to(torch.int32),
        kept=_runs(last, tails, device)[1],
        raw=(slots[tail_owner], kept_position % size),
        ends=_offsets(after, device),
        context=_context(pieces, after, cache, cache.window_index) if continued else None,
    )


def _context(
    pieces: Sequence[Piece],
    counts: list[int],
    cache: Places,
    index_of: Callable[[Tensor, Tensor], Index],
) -> Context:
    """The first `counts` entries of every piece's sequence."""
    slots = _numbers([piece.slot for piece in pieces], cache.device)
    owner, entry = _runs([0] * len(pieces), counts, cache.device)
    alone = len(pieces) == 1 and not cache.paged
    return Context(
        lengths=tuple(counts),
        cu_seqlens=_offsets(counts, cache.device),
        index=index_of(slots[owner], entry),
        view=(pieces[0].slot, counts[0]) if alone else None,
    )


def _numbers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each of several lengths starts when laid end to end."""
    return list(accumulate(lengths, initial=0))[:-1]


def _offsets(values: Sequence[int], device: torch.device, running: bool = True) -> Tensor:
    """int32: the running sum of lengths from 0 on; or the values themselves."""
    listed = list(accumulate(values, initial=0)) if running else list(values)
    return torch.tensor(listed, dtype=torch.int32, device=device)


def _alternate(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [value for pair in zip(one, other, strict=True) for value in pair]


def _runs(
    firsts: Sequence[int], counts: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Runs of consecutive numbers, laid end to end: firsts[i], counts[i] of them.

    Returns:
        the run of each number and the numbers, both int64.
    """
    total = sum(counts)
    runs = torch.arange(len(counts), device=device)
    owner = runs.repeat_interleave(_numbers(counts, device), output_size=total)
    shift = [first - start for first, start in zip(firsts, _starts(counts), strict=True)]
    return owner, _numbers(shift, device)[owner] + torch.arange(total, device=device)
