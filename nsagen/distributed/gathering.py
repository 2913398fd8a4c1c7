"""Rows that a layer's queries need of all ranks: gathered, dropped, gathered again for gradients.

`Gathering` starts a gather and awaits it; `enter` puts it into autograd's graph. The gathered rows
are no part of the graph: a backward pass gathers them again, so that a rank never keeps more than
one layer's. Their gradients are summed over the ranks and scattered, while what `enter` comes
before in the graph, such as rope and projections of keys, has not run yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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

    def by_rank(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors [all rows, ..., any], side by side, in the order of the ranks, padded:
        [C * most, ..., all]."""
        first, widths = tensors[0], _widths(tensors)
        made = first.new_zeros(self.group.size() * self.most, *first.shape[1:-1], sum(widths))
        for part, x in zip(made.split(widths, -1), tensors, strict=True):
            part.index_copy_(0, self.places, x)
        return made


@dataclass
class Gathering:
    """One exchange of some tensors of equal rows; see the module.

    Tensors that differ in their last dimension alone travel together, side by side.
    """

    places: Places
    _gathers: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    _sums: list[tuple[Tensor, list[int]] | None] = field(default_factory=list)

    def start(self, *tensors: Tensor) -> None:
        """Begin to gather this rank's rows [count, ...]."""
        places = self.places
        self._gathers = [
            (start_gather(places.padded(torch.cat(some, -1)), places.group), _widths(some))
            for some in _alike(tensors)
        ]

    def wait(self) -> list[Tensor]:
        """The rows of all ranks, in the packed batch's order."""
        found = []
        while self._gathers:
            gathered, widths = self._gathers.pop(0)
            parts = finish(gathered, self.places.group).split(widths, -1)
            found += [part.index_select(0, self.places.places) for part in parts]
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
        self._sums = []
        for some in _alike(gradients):
            if some[0] is None:
                self._sums.append(None)
                continue
            summed = start_reduce_scatter(places.by_rank(some), places.group)
            self._sums.append((summed, _widths(some)))
        return tuple(
            None if g is None else g.new_zeros(()).expand(places.count, *g.shape[1:])
            for g in gradients
        )

    def sums(self) -> tuple[Tensor | None, ...]:
        """The sums, of this rank's rows."""
        places, sums, self._sums = self.places, self._sums, []
        found: list[Tensor | None] = []
        for one in sums:
            if one is None:
                found.append(None)
                continue
            summed, widths = one
            found += finish(summed, places.group)[: places.count].split(widths, -1)
        return tuple(found)


def _alike(tensors: Sequence[Any]) -> list[list[Any]]:
    """Neighbours that can lie side by side; None is by itself."""

    def kind(x: Tensor | None) -> Any:
        return object() if x is None else (x.dtype, x.shape[:-1])

    return [list(some) for _, some in itertools.groupby(tensors, kind)]


def _widths(tensors: Sequence[Tensor]) -> list[int]:
    return [x.shape[-1] for x in tensors]


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
        of_all = gradient.new_zeros(rows, *gradient.shape[1:])
        of_all.index_copy_(0, halo.own_rows, gradient.index_select(0, halo.own))
        _add(of_all, halo.beyond_rows, gradient.index_select(0, halo.beyond))
        own, received = of_all.split([ctx.count, rows - ctx.count])
        if halo.moves:
            counts = (halo.receive_counts, halo.send_counts)
            returned = finish(start_exchange(received, *counts, group), group)
            _add(own, halo.send, returned)
        return own, None, None


def _add(to: Tensor, index: Tensor, x: Tensor) -> None:
    """Add x's rows by index, in their order: index_add on a GPU repeats only by chance."""
    to.index_put_((index,), x, accumulate=True)
