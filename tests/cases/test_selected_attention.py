"""Inputs of selected attention."""

from __future__ import annotations

import pytest

from nsagen.cases import selected_attention
from nsagen.cases.base import Sizes


def test_blocks_without_memory_are_made_without_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead-of-time compilation takes their shape alone, of batches of thousands of sequences."""
    sizes = Sizes((70, 0, 5), 2, topk=4)
    real = selected_attention.random_blocks(sizes, 16, "cpu", None)
    monkeypatch.delattr(selected_attention, "_chosen")
    made = selected_attention.random_blocks(sizes, 16, "meta", None)
    assert (made.shape, made.dtype, made.is_meta) == (real.shape, real.dtype, True)
