"""Groups of processes for the tests of this folder."""

from __future__ import annotations

import os

import pytest

from tests.distributed.ranks import on_ranks


def test_a_rank_that_aborts_says_where() -> None:
    """As one does whose memory is broken."""

    def abort_here(rank: int) -> None:
        if rank == 1:
            os.abort()

    with pytest.raises(AssertionError) as error:
        on_ranks(2, abort_here, timeout=10.0)
    text = str(error.value)
    assert "rank 1 was ended by signal 6" in text
    assert "in abort_here" in text
    assert "rank 0:" in text, "it waited for the other"
