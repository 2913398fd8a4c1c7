"""One rank's share of a packed batch: what a model's forward takes in place of `cu_seqlens`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from nsagen.distributed.collectives import start_gather
from nsagen.distributed.cuts import Cut, Halo, offsets, spans, windows_of
from nsagen.distributed.gathering import Places
from nsagen.model.checks import require
from nsagen.model.packing import Packed, Remote
from nsagen.ops.lengths import Lengths


@dataclass(frozen=True)
class Pieces:
    """This rank's queries as a packed batch: the front pieces of all sequences, then the back ones.

    A piece without tokens is an empty sequence.

    Attributes:
        cu_seqlens: int32 [2 * batch + 1], first row of each piece.
        q_start: int32 [2 * batch], position of each one's first token.
        lengths: tokens of each, and ends: its last token's position + 1; on the host.
    """

    cu_seqlens: Tensor
    q_start: Tensor
    lengths: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, cut: Cut, rank: int, device: torch.device) -> Pieces:
        counts, ends = cut.counts(rank).flatten(), cut.ends(rank).flatten()
        return cls(
            _int32(offsets(counts), device),
            _int32(cut.firsts(rank).flatten(), device),
            tuple(counts.tolist()),
            tuple(ends.tolist()),
        )


@dataclass(frozen=True)
class Windows:
    """The compression windows of a shard.

    Attributes:
        places: where they are; this rank's are those that start in its pieces.
        positions: int32, the first token of each of this rank's, within its sequence; then 0 for
            the spare rows that compression makes.
        lengths: of the tokens that each piece's windows read, [2 * batch] of them.
        halo: which tokens these are.
    """

    places: Places
    positions: Tensor
    lengths: Lengths
    halo: Halo


@dataclass(frozen=True, kw_only=True)
class Shard(Packed):
    """The layout of a rank's tokens: the front pieces of all sequences, then the back ones.

    Make it with `ContextParallel.shard`. `cu_seqlens` and `lengths` are those of the whole batch;
    `sequence` and `positions` are those of this rank's tokens.

    Attributes:
        rank: this process in the group.
        cut: which rank holds which tokens.
        tokens: this rank's part of it.
        pieces: its queries, as attention takes them.
        placed: whether a model of Transformers has this layout's positions; see
            `nsagen.distributed.inputs`.
    """

    rank: int
    cut: Cut
    tokens: Places
    pieces: Pieces
    placed: bool = False
    _windows: dict[tuple[int, int], Windows] = field(default_factory=dict, repr=False)
    _parts: dict[tuple[bool, ...], tuple[Shard, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_batch(
        cls, lengths: list[int], device: torch.device, group: ProcessGroup, remote: Remote
    ) -> Shard:
        """This rank's share of a batch whose lengths the host knows."""
        rank = group.rank()
        cut = Cut.of_tokens(lengths, group.size())
        tokens = Places.of(cut, rank, group, device, cut.ends(rank))
        counts, starts = cut.counts(rank), _int32(cut.starts, device)
        sequence = torch.arange(len(lengths)).expand(2, -1).flatten()
        sequence = sequence.repeat_interleave(counts.flatten()).to(device, non_blocking=True)
        return cls(
            starts,
            sequence,
            _int32(cut.rows(rank), device) - starts[sequence],
            tuple(lengths),
            remote=remote,
            rank=rank,
            cut=cut,
            tokens=tokens,
            pieces=Pieces.of(cut, rank, device),
        )

    def take(self, x: Tensor) -> Tensor:
        """This rank's rows of a packed tensor [N, ...], such as input_ids or targets.

        Raises:
            InvalidInputError: x has not one row for each token of the batch.
        """
        total = int(self.cut.starts[-1])
        require(
            x.shape[:1] == (total,),
            "Shard.take",
            f"the tensor must have the batch's {total} tokens as its first dimension",
            f"shape {list(x.shape)}",
            "pass the packed batch, of which each rank takes its part",
        )
        return x.index_select(0, self.tokens.rows)

    @torch.no_grad()
    def whole(self, x: Tensor) -> Tensor:
        """All ranks' rows of what each has for its tokens, in the batch's order.

        Without gradients; every rank must call it. A loss needs it never: sum each rank's.
        """
        (gathered,) = start_gather([self.tokens.padded(x)], self.tokens.group).wait()
        return gathered.index_select(0, self.cut.places.to(x.device))

    def only(self, kept: tuple[bool, ...]) -> tuple[Shard, Tensor]:
        """The layout in which the other sequences are empty, laid out once a batch; and int64 [its
        tokens of this rank], where these are among this rank's."""
        if kept not in self._parts:
            device = self.positions.device
            lengths = [n if keep else 0 for n, keep in zip(self.lengths or (), kept, strict=True)]
            assert self.remote is not None
            part = Shard.of_batch(lengths, device, self.tokens.group, self.remote)
            chosen = torch.tensor(kept).repeat(2)
            stays = chosen.repeat_interleave(self.cut.counts(self.rank).flatten())
            self._parts[kept] = part, stays.nonzero().flatten().to(device, non_blocking=True)
        return self._parts[kept]

    def lengths_for(self, kernel_size: int, kernel_stride: int) -> Lengths:
        raise AssertionError("a shard's windows are those of windows_for")

    def windows_for(self, kernel_size: int, kernel_stride: int) -> Windows:
        """The windows of these sizes, laid out once a batch."""
        sizes = (kernel_size, kernel_stride)
        if sizes not in self._windows:
            self._windows[sizes] = self._lay_out(*sizes)
        return self._windows[sizes]

    def _lay_out(self, kernel_size: int, kernel_stride: int) -> Windows:
        sizes, device = (kernel_size, kernel_stride), self.positions.device
        windows, seen = self.cut.windows(*sizes), windows_of(self.cut.ends(self.rank), *sizes)
        halo = Halo.of(self.cut, windows, self.rank, *sizes)
        counts, firsts = windows.counts(self.rank).flatten(), windows.firsts(self.rank).flatten()
        first_tokens = spans(firsts, counts) * kernel_stride
        spare = halo.index.shape[0] // kernel_stride - first_tokens.shape[0]
        return Windows(
            Places.of(windows, self.rank, self.tokens.group, device, seen),
            _int32(F.pad(first_tokens, (0, spare)), device),
            Lengths.of(_int32(offsets(halo.lengths), device), halo.index.shape[0], *sizes),
            halo.to(device),
        )


def _int32(x: Tensor, device: torch.device) -> Tensor:
    return x.to(torch.int32).to(device, non_blocking=True)
