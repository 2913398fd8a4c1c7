"""A constant less a tile, as block selection counts the places that forced blocks leave."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import keeps_tiles_in_constants
from tests.support import kernel_device

TOPK = tl.constexpr(4)


@triton.jit
def count_places(places, SIZE: tl.constexpr):
    block = tl.arange(0, SIZE)
    tl.store(places + block, tl.minimum(TOPK - block, 2))


def test_a_constant_less_a_tile() -> None:
    """Triton 3.7's and 3.8's interpreters keep it a constant, which tl.minimum then refuses."""
    places = torch.empty(4, dtype=torch.int32, device=kernel_device())
    refused = pytest.raises(Exception, match="to tensor")
    with refused if keeps_tiles_in_constants() else contextlib.nullcontext():
        count_places[(1,)](places, 4)
        assert places.tolist() == [2, 2, 2, 1]
