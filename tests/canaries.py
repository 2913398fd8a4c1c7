"""Tensors in the middle of larger buffers, whose other elements tell who went outside.

A kernel that writes outside an output, or between its rows, changes them; one that lets what it
read outside an input count sees NaN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nsagen.cases.base import Case

RIM = int(os.environ.get("NSAGEN_TEST_RIM", "64"))
"""Elements before and after; a multiple of what any load wants to be aligned to. 0 leaves what is
past a tensor to a tool that watches memory; see `make sanitize`."""

LARGEST = 1 << 24
"""Elements of a tensor that is guarded: some tests fill a GPU."""


class Guarded:
    """A copy of a tensor, with its strides, and the buffer that it lies in."""

    def __init__(self, tensor: Tensor) -> None:
        self.original = tensor
        size = _extent(tensor) + 2 * RIM
        fill = float("nan") if tensor.dtype.is_floating_point else 77
        self.buffer = torch.full((size,), fill, dtype=tensor.dtype, device=tensor.device)
        self.untouched = self.buffer.clone()
        self.inner = self._inside(self.buffer)
        self.inner.copy_(tensor)

    def check(self, name: str) -> None:
        """Nothing but the tensor itself was written; its values go to the original."""
        self._inside(self.untouched).copy_(self.inner)
        changed = _bytes(self.buffer) != _bytes(self.untouched)
        places = changed.nonzero().flatten() // self.buffer.element_size() - RIM
        assert not len(places), f"{name}: written outside, at elements {places[:8].tolist()}"
        self.original.copy_(self.inner)

    def _inside(self, buffer: Tensor) -> Tensor:
        return buffer.as_strided(self.original.shape, self.original.stride(), RIM)


@contextmanager
def guarded(case: Case) -> Iterator[tuple[object, ...]]:
    """The case's arguments with guarded tensors; afterwards its outputs have what was written.

    Inputs are guarded if they have floats: what an index says has no value that shows.
    """
    outputs = {id(out): name for name, out in case.outputs.items()}
    guards = {
        id(x): Guarded(x)
        for x in case.args
        if isinstance(x, Tensor)
        and (id(x) in outputs or x.dtype.is_floating_point)
        and x.numel() > 0
        and _extent(x) <= LARGEST
        and _apart(x)
    }
    yield tuple(guards[id(x)].inner if id(x) in guards else x for x in case.args)
    for key, guard in guards.items():
        guard.check(outputs.get(key, "an input"))


def _extent(x: Tensor) -> int:
    """Elements from the first to the last one, gaps included."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def _apart(x: Tensor) -> bool:
    """Whether no two elements of x share a place."""
    return all(n == 1 or s > 0 for n, s in zip(x.shape, x.stride(), strict=True))


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)
