"""Offsets and positions in the packed layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nsagen.ops.layout import compressed_cu_seqlens, positions_in_sequence
from tests.ops.dense import PROPERTY, SEQLENS, Packed, offsets, window_count


@PROPERTY
@given(SEQLENS, st.integers(0, 3))
def test_positions_count_from_each_sequences_start(seqlens: list[int], padding: int) -> None:
    positions = positions_in_sequence(offsets(seqlens), sum(seqlens) + padding)
    assert positions.dtype == torch.int32
    assert positions.tolist() == Packed.of(seqlens).position.tolist() + [0] * padding


@PROPERTY
@given(SEQLENS, st.integers(1, 4), st.integers(1, 4))
def test_compressed_offsets_count_whole_windows(seqlens: list[int], width: int, s: int) -> None:
    counts = [window_count(length, width * s, s) for length in seqlens]
    result = compressed_cu_seqlens(offsets(seqlens), width * s, s)
    assert result.dtype == torch.int32
    assert torch.equal(result, offsets(counts))


@pytest.mark.parametrize(
    ("length", "windows"), [(0, 0), (16, 0), (31, 0), (32, 1), (47, 1), (48, 2)]
)
def test_one_token_short_of_a_window_has_none(length: int, windows: int) -> None:
    """(31 - 32) // 16 + 1 is 0 only if the division floors; truncated, it is 1."""
    assert compressed_cu_seqlens(offsets([length]), 32, 16).tolist() == [0, windows]


def test_no_sequences() -> None:
    assert positions_in_sequence(offsets([]), 0).tolist() == []
    assert compressed_cu_seqlens(offsets([]), 32, 16).tolist() == [0]


def test_nothing_reads_values_on_the_host() -> None:
    """A fake tensor has no values: reading one raises."""
    with FakeTensorMode():
        cu_seqlens = torch.zeros(4, dtype=torch.int32)
        assert positions_in_sequence(cu_seqlens, 10).shape == (10,)
        assert compressed_cu_seqlens(cu_seqlens, 32, 16).shape == (4,)
