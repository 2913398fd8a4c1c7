"""How the rows of a packed batch are divided over ranks: arithmetic on the host, no communication.

Each sequence is cut into 2 C pieces for C ranks. Rank r holds piece r, the front one, and piece
2 C - 1 - r, the back one: causal work grows along a sequence, and every such pair has the same.
Rows are tokens, or compression windows; a window belongs to the piece in which it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


def spans(starts: Tensor, counts: Tensor) -> Tensor:
    """The numbers starts[i] .. starts[i] + counts[i] - 1 of all i, one after the other: int64."""
    before = counts.cumsum(0) - counts
    return torch.repeat_interleave(starts - before, counts) + torch.arange(int(counts.sum()))


def offsets(counts: Tensor) -> Tensor:
    """Where each of some runs begins, and their total: int64 [len(counts) + 1]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def windows_of(tokens: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """How many compression windows some numbers of tokens have."""
    spare = (tokens - kernel_size).div(kernel_stride, rounding_mode="floor")
    return (spare + 1).clamp(min=0)


@dataclass(frozen=True)
class Cut:
    """The rows of all sequences, and which rank holds them.

    Attributes:
        bounds: int64 [batch, 2 C + 1], first row of each piece within its sequence, and the
            sequence's length.
    """

    bounds: Tensor

    @classmethod
    def of_tokens(cls, lengths: Sequence[int], ranks: int) -> Cut:
        """Pieces of tokens that differ in length by one at most."""
        sizes = torch.tensor(lengths, dtype=torch.int64).unsqueeze(1)
        return cls(sizes * torch.arange(2 * ranks + 1) // (2 * ranks))

    def windows(self, kernel_size: int, kernel_stride: int) -> Cut:
        """The compression windows of these tokens."""
        total = windows_of(self.bounds[:, -1:], kernel_size, kernel_stride)
        return Cut(torch.minimum(-(-self.bounds // kernel_stride), total))

    @property
    def ranks(self) -> int:
        return self.bounds.shape[1] // 2

    @cached_property
    def starts(self) -> Tensor:
        """int64 [batch + 1], first row of each sequence in the packed batch, and all rows."""
        return offsets(self.bounds[:, -1])

    def pieces(self, rank: int) -> tuple[int, int]:
        """The two pieces of each sequence that a rank holds."""
        return rank, 2 * self.ranks - 1 - rank

    def firsts(self, rank: int) -> Tensor:
        """int64 [2, batch], first row of each front and back piece within its sequence."""
        return torch.stack([self.bounds[:, piece] for piece in self.pieces(rank)])

    def counts(self, rank: int) -> Tensor:
        """int64 [2, batch], rows of each front and back piece."""
        sizes = self.bounds.diff(dim=1)
        return torch.stack([sizes[:, piece] for piece in self.pieces(rank)])

    def rows(self, rank: int) -> Tensor:
        """A rank's rows in the packed batch: the fronts of all sequences, then the backs."""
        firsts = self.firsts(rank) + self.starts[:-1]
        return spans(firsts.flatten(), self.counts(rank).flatten())

    def ends(self, rank: int) -> Tensor:
        """int64 [2, batch], rows of each sequence up to the end of its front and its back piece; 0
        where a rank has none of the piece."""
        return torch.where(self.counts(rank) > 0, self.firsts(rank) + self.counts(rank), 0)

    def up_to(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The places of the rows that come before some ends, as a packed batch of its own.

        Args:
            ends: int64 [2, batch], of the fronts and of the backs.

        Returns:
            those of all fronts, and those of all backs.
        """
        fronts, backs = (self.places[spans(self.starts[:-1], counts)] for counts in ends)
        return fronts, backs

    @cached_property
    def most(self) -> int:
        """Rows of the rank that has the most; at least 1, because no exchange is of nothing."""
        return max(1, *(int(self.counts(rank).sum()) for rank in range(self.ranks)))

    @cached_property
    def places(self) -> Tensor:
        """int64 [rows], where each packed row is when every rank's are padded to `most`."""
        found = torch.empty(int(self.starts[-1]), dtype=torch.int64)
        for rank in range(self.ranks):
            rows = self.rows(rank)
            found[rows] = rank * self.most + torch.arange(rows.shape[0])
        return found


@dataclass(frozen=True)
class Halo:
    """The tokens that a rank's windows read, some of which other ranks hold.

    Attributes:
        send: int64, this rank's tokens that others need, by destination.
        send_counts, receive_counts: how many go to, and come from, each rank.
        index: int64 [tokens of all windows], each in this rank's tokens followed by the received.
        once: the same, but one past them all where a token has come before.
        again, again_rows: where in `index` these are, and their entries there.
        send_repeats, again_repeats: whether a row may be there several times.
        lengths: int64 [2 * batch], tokens of each piece's windows: 0 for a piece without any.
        moves: whether any rank needs a token of another.
    """

    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    index: Tensor
    once: Tensor
    again: Tensor
    again_rows: Tensor
    send_repeats: bool
    again_repeats: bool
    lengths: Tensor
    moves: bool

    @classmethod
    def of(cls, tokens: Cut, windows: Cut, rank: int, kernel_size: int, kernel_stride: int) -> Halo:
        """What `rank` exchanges; every rank computes what all others need."""
        ranks, most, places = tokens.ranks, tokens.most, tokens.places
        sizes = (kernel_size, kernel_stride)
        needs = [_remote(tokens, windows, each, *sizes) for each in range(ranks)]
        from_here = [need[need // most == rank] % most for need in needs]
        send = torch.cat(from_here)
        first, length = _read(windows, rank, *sizes)
        at = places[spans((first + tokens.starts[:-1]).flatten(), length.flatten())]
        here = int(tokens.counts(rank).sum())
        received = here + torch.searchsorted(needs[rank], at)
        index = torch.where(at // most == rank, at % most, received)
        again = _repeated(index)
        once = index.index_fill(0, again, here + needs[rank].shape[0])
        return cls(
            send,
            [one.shape[0] for one in from_here],
            torch.bincount(needs[rank] // most, minlength=ranks).tolist(),
            *(index, once, again, index[again]),
            *(_repeats(send), _repeats(index[again])),
            length.flatten(),
            any(need.shape[0] for need in needs),
        )

    def to(self, device: torch.device) -> Halo:
        """With the indices that exchanges use on a device."""
        names = ("send", "index", "once", "again", "again_rows")
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        return replace(self, **moved)


def _repeated(rows: Tensor) -> Tensor:
    """Where rows are that came before, ascending."""
    ordered, order = rows.sort(stable=True)
    return order[1:][ordered[1:] == ordered[:-1]].sort().values


def _repeats(rows: Tensor) -> bool:
    return _repeated(rows).shape[0] > 0


def _read(windows: Cut, rank: int, kernel_size: int, kernel_stride: int) -> tuple[Tensor, Tensor]:
    """First token, within its sequence, and number of tokens that each piece's windows read."""
    counts = windows.counts(rank)
    length = (counts - 1) * kernel_stride + kernel_size
    return windows.firsts(rank) * kernel_stride, torch.where(counts > 0, length, 0)


def _remote(tokens: Cut, windows: Cut, rank: int, kernel_size: int, kernel_stride: int) -> Tensor:
    """Places of the tokens that a rank's windows read and it does not hold, ascending."""
    first, length = _read(windows, rank, kernel_size, kernel_stride)
    start = torch.maximum(first, tokens.ends(rank))
    count = (first + length - start).clamp(min=0)
    places = tokens.places[spans((start + tokens.starts[:-1]).flatten(), count.flatten())]
    return torch.unique(places[places // tokens.most != rank])
