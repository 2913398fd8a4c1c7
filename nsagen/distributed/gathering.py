"""Rows that a layer's queries need of all ranks: gathered, dropped, gathered again for gradients.

`Gathering` starts a gather and awaits it; `enter` puts it into autograd's graph. The gathered rows
are no part of the graph: a backward pass gathers them again, so that a rank never keeps more than
one layer's. Their gradients are summed over the ranks and scattered, while what `enter` comes
before in the graph, such as rope and projections of keys, has not run yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from nsagen.distributed.collectives import (
    Exchange,
    start_exchange,
    start_gather,
    start_reduce_scatter,
)
from nsagen.distributed.cuts import Cut, Halo, offsets

SMALL_BYTES = 1 << 23
"""Of what a rank sends. An exchange of less takes about as long as one of nothing, on the host
longer than on the links, so what is gathered for a layer goes together."""


@dataclass(frozen=True)
class Places:
    """A `Cut` as one rank's exchanges need it.

    A rank's pieces of a sequence are two packed sequences, each with all rows up to its end. So
    the rows that the front ones see come twice.

    Attributes:
        group: the ranks.
        count: rows of this rank; most: of the rank that has the most.
        rows: int64 [count], this rank's rows in the packed batch.
        seen: int64, where each row that this rank sees is when every rank's are padded to `most`:
            those of the fronts, then of the backs, which are apart in `fronts` and `backs`.
        starts: int32 [2 * batch + 1], first of these of each piece, and their number.
    """

    group: ProcessGroup
    count: int
    most: int
    rows: Tensor
    seen: Tensor
    fronts: Tensor
    backs: Tensor
    starts: Tensor

    @classmethod
    def of(
        cls, cut: Cut, rank: int, group: ProcessGroup, device: torch.device, ends: Tensor
    ) -> Places:
        """
        Args:
            ends: int64 [2, batch], rows of each sequence that its front and its back piece see.
        """
        pieces, starts = cut.up_to(ends), offsets(ends.flatten()).to(torch.int32)
        there = (cut.rows(rank), torch.cat(pieces), starts)
        rows, seen, starts = (x.to(device, non_blocking=True) for x in there)
        fronts, backs = seen.split([x.shape[0] for x in pieces])
        return cls(group, rows.shape[0], cut.most, rows, seen, fronts, backs, starts)

    def padded(self, x: Tensor) -> Tensor:
        """x [rows, ...] with rows of zeros up to `most`."""
        missing = self.most - x.shape[0]
        return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing > 0 else x

    def by_rank(self, x: Tensor) -> Tensor:
        """x [seen, ...] in the order of the ranks, padded, what comes twice added up:
        [C * most, ...].

        No row comes twice within the fronts or the backs, so no sum depends on an order.
        """
        of_fronts, of_backs = x.split([self.fronts.shape[0], self.backs.shape[0]])
        made = x.new_zeros(self.group.size() * self.most, *x.shape[1:])
        made.index_copy_(0, self.backs, of_backs)
        if of_fronts.shape[0] > 0:
            both = of_fronts + made.index_select(0, self.fronts)
            made.index_copy_(0, self.fronts, both)
        return made


@dataclass
class Gathering:
    """One exchange of tensors [rows, heads, any], which travel side by side; see the module."""

    places: Places
    _widths: list[int] = field(default_factory=list)
    _started: tuple[Exchange, int] | None = None

    def enter(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rows [most, heads, any] of tensors [rows, heads, any], some of which may be spare; their
        gradients will be what `sum_gradients` sums."""
        return _Entered.apply(self, *tensors)

    def join(self, *tensors: Tensor) -> Tensor:
        """Rows [most, heads, any] as they travel."""
        self._widths = _widths(tensors)
        return _side_by_side(tensors)

    def start(self, joined: Tensor) -> None:
        """Begin to gather what `join` gave."""
        start_together([self], [joined])

    def wait(self) -> tuple[Tensor, ...]:
        """The rows that this rank sees, of each tensor given to `join`: parts of one tensor."""
        gathered = self._finish()
        return gathered.index_select(0, self.places.seen).split(self._widths, -1)

    def sum_gradients(
        self, gradients: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Begin to sum the gradients of rows seen over the ranks, of the tensors that need one.

        Returns:
            the sums, which are complete when `enter`'s node has waited for them.
        """
        return sum_together([self], [gradients], [needed])[0]

    def _finish(self) -> Tensor:
        assert self._started is not None
        (exchange, place), self._started = self._started, None
        return exchange.wait()[place]

    def wait_for_sums(self) -> None:
        """Wait for what `sum_gradients` began, if anything."""
        if self._started is not None:
            self._finish()


def are_small(joined: Sequence[Tensor]) -> bool:
    """Whether what several gathers have joined goes together; the same on all ranks."""
    return sum(x.nbytes for x in joined) < SMALL_BYTES


def start_together(gatherings: Sequence[Gathering], joined: Sequence[Tensor]) -> None:
    """`Gathering.start` of each, in one exchange."""
    exchange = start_gather(joined, gatherings[0].places.group)
    for place, gathering in enumerate(gatherings):
        gathering._started = exchange, place


def sum_together(
    gatherings: Sequence[Gathering],
    gradients: Sequence[Sequence[Tensor]],
    needed: Sequence[Sequence[bool]],
) -> list[list[Tensor | None]]:
    """`Gathering.sum_gradients` of each, in one exchange."""
    wanted = [
        [g for g, need in zip(*pair, strict=True) if need]
        for pair in zip(gradients, needed, strict=True)
    ]
    pairs = [pair for pair in zip(gatherings, wanted, strict=True) if pair[1]]
    summed = iter(())
    if pairs:
        by_rank = [gathering.places.by_rank(_side_by_side(some)) for gathering, some in pairs]
        exchange = start_reduce_scatter(by_rank, gatherings[0].places.group)
        for place, (gathering, _) in enumerate(pairs):
            gathering._started = exchange, place
        if torch.is_anomaly_enabled():  # it reads them at once
            exchange.wait()
        summed = (
            part
            for one, (_, some) in zip(exchange.given, pairs, strict=True)
            for part in one.split(_widths(some), -1)
        )
    return [[next(summed) if need else None for need in of_one] for of_one in needed]


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([*tensors], -1) if len(tensors) > 1 else tensors[0]


def _widths(tensors: Sequence[Tensor]) -> list[int]:
    return [x.shape[-1] for x in tensors]


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gathering: Gathering, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gathering, places = gathering, gathering.places
        ctx.rows = tensors[0].shape[0]
        ctx.set_materialize_grads(False)
        fits = ctx.rows == places.most
        return tuple(x if fits else places.padded(x[: places.most]) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *sums: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.gathering.wait_for_sums()
        spare = ctx.rows - ctx.gathering.places.most
        if spare < 0:
            sums = tuple(None if x is None else x[:spare] for x in sums)
        elif spare > 0:
            sums = tuple(None if x is None else F.pad(x, (0, 0, 0, 0, 0, spare)) for x in sums)
        return None, *sums


class RemoteTokens(torch.autograd.Function):
    """The tokens of a rank's windows: its own, and those that other ranks hold.

    Tensors [tokens, heads, any] -> [tokens of all windows, heads, any], see `Halo`, parts of one
    tensor; the indices are on their device.
    """

    @staticmethod
    def forward(ctx: Any, halo: Halo, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.halo, ctx.group, ctx.count = halo, group, tensors[0].shape[0]
        ctx.widths, x = _widths(tensors), _side_by_side(tensors)
        if halo.moves:
            counts = (halo.send_counts, halo.receive_counts)
            sent = start_exchange(x.index_select(0, halo.send), *counts, group)
            x = torch.cat([x, *sent.wait()])
        return x.index_select(0, halo.index).split(ctx.widths, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        halo, group, gradient = ctx.halo, ctx.group, _side_by_side(gradients)
        received = sum(halo.receive_counts)
        of_all = gradient.new_zeros(ctx.count + received + 1, *gradient.shape[1:])
        of_all.index_copy_(0, halo.once, gradient)  # what came before goes to the last row
        if halo.again.shape[0] > 0:
            again = gradient.index_select(0, halo.again)
            _add(of_all, halo.again_rows, again, halo.again_repeats)
        own, returned, _ = of_all.split([ctx.count, received, 1])
        if halo.moves:
            counts = (halo.receive_counts, halo.send_counts)
            (returned,) = start_exchange(returned, *counts, group).wait()
            _add(own, halo.send, returned, halo.send_repeats)
        return None, None, *own.split(ctx.widths, -1)


def _add(to: Tensor, index: Tensor, x: Tensor, repeats: bool) -> None:
    """Add x's rows by index, with the same bits each time: index_add on a GPU adds to a row that
    repeats in any order, and index_put in theirs, by a sort."""
    if repeats:
        to.index_put_((index,), x, accumulate=True)
    else:
        to.index_add_(0, index, x)
