"""Who holds what: every row has one holder, and every window its tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsagen.distributed.cuts import Cut, Halo, spans, windows_of
from nsagen.ops.layout import compressed_cu_seqlens

BATCHES = st.lists(st.integers(0, 70), max_size=6)
WINDOWS = st.sampled_from([(1, 1), (4, 2), (8, 4), (8, 8), (12, 3)])


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def test_spans() -> None:
    made = spans(torch.tensor([5, 9, 2]), torch.tensor([2, 0, 3]))
    assert made.tolist() == [5, 6, 2, 3, 4]
    assert spans(torch.empty(0).long(), torch.empty(0).long()).tolist() == []


def test_a_rank_has_a_piece_of_the_front_and_one_of_the_back() -> None:
    cut = Cut.of_tokens([16], ranks=2)
    assert [cut.rows(rank).tolist() for rank in range(2)] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]


@settings(max_examples=60, deadline=None)
@given(lengths=BATCHES, ranks=st.integers(1, 5), sizes=WINDOWS)
def test_every_token_and_every_window_has_one_holder(
    lengths: list[int], ranks: int, sizes: tuple[int, int]
) -> None:
    tokens = Cut.of_tokens(lengths, ranks)
    windows = tokens.windows(*sizes)
    ends = compressed_cu_seqlens(starts_of(lengths).int(), *sizes)
    assert windows.starts.tolist() == ends.tolist()
    for cut in (tokens, windows):
        held = torch.cat([cut.rows(rank) for rank in range(ranks)])
        assert sorted(held.tolist()) == list(range(int(cut.starts[-1])))
        for rank in range(ranks):
            rows = cut.rows(rank)
            places = rank * cut.most + torch.arange(rows.shape[0])
            assert torch.equal(cut.places[rows], places)
    assert all(int(n.max()) - int(n.min()) <= 1 for n in tokens.bounds.diff(dim=1) if n.numel()), (
        "pieces are as even as tokens allow"
    )


@settings(max_examples=60, deadline=None)
@given(lengths=BATCHES, ranks=st.integers(1, 5), sizes=WINDOWS)
def test_windows_read_their_tokens_wherever_these_are(
    lengths: list[int], ranks: int, sizes: tuple[int, int]
) -> None:
    """Even those that span several pieces, when pieces are shorter than windows."""
    size, stride = sizes
    tokens = Cut.of_tokens(lengths, ranks)
    windows = tokens.windows(size, stride)
    halos = [Halo.of(tokens, windows, rank, size, stride) for rank in range(ranks)]
    assert len({halo.moves for halo in halos}) == 1, "all ranks exchange, or none does"
    for rank, halo in enumerate(halos):
        received = torch.cat(
            [
                tokens.rows(other)[from_.send.split(from_.send_counts)[rank]]
                for other, from_ in enumerate(halos)
            ]
        )
        assert received.shape[0] == sum(halo.receive_counts)
        read = torch.cat([tokens.rows(rank), received])[halo.index]
        expected = []
        starts = tokens.starts[:-1].repeat(2)
        firsts, counts = windows.firsts(rank).flatten(), windows.counts(rank).flatten()
        for at, first, count in zip(starts.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            if count:
                begin = at + first * stride
                expected += range(begin, begin + (count - 1) * stride + size)
        assert read.tolist() == expected
        assert int(halo.lengths.sum()) == len(expected)
        rows = torch.arange(tokens.rows(rank).shape[0] + received.shape[0])
        here = torch.isin(halo.once, rows)
        assert halo.again.tolist() == (~here).nonzero().flatten().tolist()
        assert sorted(halo.once[here].tolist()) == halo.index.unique().tolist()
        assert torch.equal(halo.again_rows, halo.index[halo.again])
        assert halo.again_repeats == (halo.again_rows.unique().shape != halo.again_rows.shape)
        assert halo.send_repeats == (halo.send.unique().shape != halo.send.shape)


@settings(max_examples=60, deadline=None)
@given(lengths=BATCHES, ranks=st.integers(1, 5), sizes=WINDOWS)
def test_each_piece_sees_its_sequence_up_to_its_end(
    lengths: list[int], ranks: int, sizes: tuple[int, int]
) -> None:
    """All tokens up to the piece's last, and the windows that these have; nothing comes twice
    among the fronts, or among the backs."""
    tokens = Cut.of_tokens(lengths, ranks)
    for rank in range(ranks):
        ends = tokens.ends(rank)
        for cut, seen in ((tokens, ends), (tokens.windows(*sizes), windows_of(ends, *sizes))):
            held = torch.cat([cut.rows(each) for each in range(ranks)])
            packed = torch.empty(ranks * cut.most, dtype=torch.int64)
            packed[cut.places[held]] = held
            for places, counts, piece in zip(cut.up_to(seen), seen, (0, 1), strict=True):
                starts = cut.starts[:-1].tolist()
                expected = [
                    at + i for at, n in zip(starts, counts.tolist(), strict=True) for i in range(n)
                ]
                assert packed[places].tolist() == expected
                held_too = tokens.counts(rank)[piece] > 0
                firsts = tokens.firsts(rank)[piece] + tokens.counts(rank)[piece]
                assert torch.equal(ends[piece], firsts.where(held_too, 0))


@pytest.mark.parametrize("ranks", [2, 8])
def test_causal_work_is_even(ranks: int) -> None:
    cut = Cut.of_tokens([131072], ranks)
    work = [float(cut.rows(rank).double().sum()) for rank in range(ranks)]
    assert max(work) / min(work) < 1.0001
