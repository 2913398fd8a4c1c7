"""Rows that a layer's queries need of all ranks: gathered, dropped, gathered again for gradients.

`Gathering` starts a gather and awaits it; `enter` puts it into autograd's graph. The gathered rows
are no part of the graph: a backward pass gathers them again, so that a rank never keeps more than
one layer's. Their gradients are summed over the ranks and scattered, while what `enter` comes
before in the graph, such as rope and projections of keys, has not run yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nsagen.distributed.collectives import (
    finish,
    start_exchange,
    start_gather,
    start_reduce_scatter,
)
from nsagen.distributed.cuts import Cut, Halo


@dataclass(frozen=True)
class Places:
    """A `Cut` as one rank's exchanges need it.

    Attributes:
        group: the ranks.
        count: rows of this rank; most: of the rank that has the most.
        rows: int64 [count], this rank's rows in the packed batch.
        places: int64 [all rows], where each is when every rank's are padded to `most`.
        starts: int32 [batch + 1], first row of each sequence in the packed batch, and all rows.
    """

    group: ProcessGroup
    count: int
    most: int
    rows: Tensor
    places: Tensor
    starts: Tensor

    @classmethod
    def of(cls, cut: Cut, rank: int, group: ProcessGroup, device: torch.device) -> Places:
        rows, starts = cut.rows(rank), cut.starts.to(torch.int32)
        there = [x.to(device, non_blocking=True) for x in (rows, cut.places, starts)]
        return cls(group, rows.shape[0], cut.most, *there)

    def padded(self, x: Tensor) -> Tensor:
        """x [count, ...] with rows of zeros up to `most`."""
        if self.count == self.most:
            return x
        return torch.cat([x, x.new_zeros(self.most - self.count, *x.shape[1:])])

    def by_rank(self, x: Tensor) -> Tensor:
        """x [all rows, ...] in the order of the ranks, padded: [C * most, ...]."""
        made = x.new_zeros(self.group.size() * self.most, *x.shape[1:])
        return made.index_copy_(0, self.places, x)


@dataclass
class Gathering:
    """One exchange of some tensors of equal rows; see the module."""

    places: Places
    _gathers: list[Tensor] = field(default_factory=list)
    _sums: list[Tensor | None] = field(default_factory=list)

    def start(self, *tensors: Tensor) -> None:
        """Begin to gather this rank's rows [count, ...]."""
        places = self.places
        self._gathers = [start_gather(places.padded(x), places.group) for x in tensors]

    def wait(self) -> list[Tensor]:
        """The rows of all ranks, in the packed batch's order."""
        found = []
        for _ in range(len(self._gathers)):  # one at a time: half of the memory
            gathered = finish(self._gathers.pop(0), self.places.group)
            found.append(gathered.index_select(0, self.places.places))
        return found

    def enter(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors, whose gradients will be what `sum_gradients` sums."""
        return _Entered.apply(self, *tensors)

    def sum_gradients(self, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Begin to sum gradients of all rows over the ranks.

        Returns:
            what stands for them in the graph until `enter`'s node waits for the sums.
        """
        places = self.places
        self._sums = [
            None if g is None else start_reduce_scatter(places.by_rank(g), places.group)
            for g in gradients
        ]
        return tuple(
            None if g is None else g.new_zeros(()).expand(places.count, *g.shape[1:])
            for g in gradients
        )

    def sums(self) -> tuple[Tensor | None, ...]:
        """The sums, of this rank's rows."""
        places, sums, self._sums = self.places, self._sums, []
        return tuple(None if x is None else finish(x, places.group)[: places.count] for x in sums)


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gathering: Gathering, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gathering = gathering
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gathering.sums()


class RemoteTokens(torch.autograd.Function):
    """The tokens of a rank's windows: its own, and those that other ranks hold.

    x [tokens, ...] -> [tokens of all windows, ...], see `Halo`; its indices are on x's device.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo, group: ProcessGroup) -> Tensor:
        ctx.halo, ctx.group, ctx.count = halo, group, x.shape[0]
        if halo.moves:
            sent = x.index_select(0, halo.send)
            counts = (halo.send_counts, halo.receive_counts)
            x = torch.cat([x, finish(start_exchange(sent, *counts, group), group)])
        return x.index_select(0, halo.index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), halo, group = gradients, ctx.halo, ctx.group
        rows = ctx.count + sum(halo.receive_counts)
        of_all = _summed(gradient, halo.index, rows)
        own, received = of_all.split([ctx.count, rows - ctx.count])
        if halo.moves:
            counts = (halo.receive_counts, halo.send_counts)
            returned = finish(start_exchange(received, *counts, group), group)
            own = own + _summed(returned, halo.send, ctx.count)
        return own, None, None


def _summed(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """x's rows added up by index, in their order: index_add on a GPU repeats only by chance."""
    return x.new_zeros(rows, *x.shape[1:]).index_put_((index,), x, accumulate=True)
