"""A packed batch cut into chunks: some queries of each sequence, beside all of its keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Some queries of each sequence of a batch.

    Attributes:
        rows: of the batch's queries, those of the chunk.
        cu_seqlens: int32 [batch + 1], of these.
        q_start: int32 [batch], the position of each sequence's first one.
    """

    rows: Tensor
    cu_seqlens: Tensor
    q_start: Tensor


def cut(cuts: list[list[int]]) -> Iterator[Chunk]:
    """The chunks of a batch; of each sequence, its boundaries from 0 to its length, ascending."""
    begins = list(itertools.accumulate((sequence[-1] for sequence in cuts), initial=0))
    for bounds in zip(*(itertools.pairwise(sequence) for sequence in cuts), strict=True):
        rows = [torch.arange(n + lo, n + hi) for n, (lo, hi) in zip(begins, bounds, strict=False)]
        ends = itertools.accumulate((hi - lo for lo, hi in bounds), initial=0)
        starts = [lo for lo, _ in bounds]
        yield Chunk(
            torch.cat(rows), *(torch.tensor([*x], dtype=torch.int32) for x in (ends, starts))
        )


def check_gradients(
    attend: Callable[..., Tensor],
    q: Tensor,
    keys: list[Tensor],
    cuts: list[list[int]],
    compare: Callable[[Tensor, Tensor], None],
) -> None:
    """Outputs and gradients of the chunks, queries' joined and keys' summed, are the whole's.

    Args:
        attend: from q, the keys and values, and a `Chunk` or None for the whole, the output.
        q: all queries; keys: all tensors that every chunk reads whole.
        compare: raises unless two tensors agree: what came, and what is right.
    """
    leaves = [x.detach().requires_grad_() for x in (q, *keys)]
    whole = attend(*leaves, None)
    do = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(whole.dtype)
    expected = torch.autograd.grad(whole, leaves, do)
    o, dq = torch.full_like(whole, torch.nan), torch.full_like(q, torch.nan)
    sums = [torch.zeros_like(x) for x in keys]
    for chunk in cut(cuts):
        parts = [x.detach().requires_grad_() for x in (q[chunk.rows], *keys)]
        came = attend(*parts, chunk)
        o[chunk.rows] = came.detach()
        mine, *theirs = torch.autograd.grad(came, parts, do[chunk.rows])
        dq[chunk.rows] = mine
        sums = [total + found for total, found in zip(sums, theirs, strict=True)]
    for came, right in zip((o, dq, *sums), (whole, *expected), strict=True):
        compare(came, right.detach())


@st.composite
def cuts(draw: st.DrawFn, longest: int = 24) -> list[list[int]]:
    """Up to three sequences, empty ones among them, in one to three chunks, of any length each."""
    chunks = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=3))
    inner = [sorted(draw(st.integers(0, n)) for _ in range(chunks - 1)) for n in lengths]
    return [[0, *cut, n] for cut, n in zip(inner, lengths, strict=True)]
