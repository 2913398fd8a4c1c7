"""Block selection against counted overlaps and one block taken at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference
from nsagen.ops.reference import _attend
from nsagen.ops.reference.block_selection import (
    BlockRule,
    block_scores,
    overlap_weights,
    select_blocks,
)
from tests.ops import dense
from tests.ops.dense import HEADS, PROPERTY, SEQLENS, offsets, windows_and_blocks

DIM = 8


def select(q: Tensor, k: Tensor, seqlens: list[int], rule: BlockRule) -> Tensor:
    """topk_idx of compressed attention over `seqlens`, both ways that give it."""
    ends = offsets(seqlens)
    k_ends = reference.compressed_cu_seqlens(ends, rule.kernel_size, rule.kernel_stride)
    _, lse = reference.compressed_attention_forward(
        q, k, k, ends, k_ends, kernel_size=rule.kernel_size, kernel_stride=rule.kernel_stride
    )
    topk_idx = reference.block_selection(q, k, lse, ends, k_ends, **vars(rule))
    _, same = reference.compressed_attention(
        q,
        k,
        k,
        rule.kernel_size,
        rule.kernel_stride,
        rule.block_size,
        rule.topk,
        ends,
        k_ends,
        init_blocks=rule.init_blocks,
        local_blocks=rule.local_blocks,
    )
    assert torch.equal(topk_idx, same)
    return topk_idx


@PROPERTY
@given(
    SEQLENS,
    HEADS,
    windows_and_blocks(),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 4),
    st.sampled_from([1 << 24, 200]),
)
def test_matches_counted_overlaps(
    seqlens: list[int],
    heads: tuple[int, int],
    shape: tuple[int, int, int],
    init_blocks: int,
    local_blocks: int,
    more: int,
    max_scores: int,
) -> None:
    size, stride, block_size = shape
    topk = max(1, init_blocks + local_blocks + more)
    rule = BlockRule(size, stride, block_size, topk, init_blocks, local_blocks)
    windows = sum(dense.window_count(length, size, stride) for length in seqlens)
    torch.manual_seed(0)
    q = torch.randn(sum(seqlens), heads[0], DIM, dtype=torch.float64)
    k = torch.randn(windows, heads[1], DIM, dtype=torch.float64)
    mask = dense.window_mask(seqlens, size, stride)
    _, _, probabilities = dense.attention(q, k, k, mask, DIM**-0.5)
    expected = dense.blocks(
        probabilities,
        seqlens,
        heads[1],
        size,
        stride,
        block_size,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attend, "MAX_SCORES", max_scores)
        came = select(q, k, seqlens, rule)
    assert came.dtype == torch.int32
    assert torch.equal(came, expected)


@pytest.mark.parametrize(
    ("shape", "first", "weights"),
    [
        ((32, 16, 64), -1, [1, 2, 2, 2, 1]),
        ((16, 16, 64), 0, [1, 1, 1, 1]),
        ((32, 16, 16), -1, [1, 1]),
        ((64, 16, 32), -3, [1, 2, 2, 2, 1]),
    ],
)
def test_overlaps(shape: tuple[int, int, int], first: int, weights: list[int]) -> None:
    assert overlap_weights(BlockRule(*shape, 3, 1, 2)) == (first, weights)


def test_block_j_sums_windows_from_4j_minus_1_to_4j_plus_3() -> None:
    """Equation 9 is a block early with 0-based indices, and a stride late with the other sign."""
    rule = BlockRule(32, 16, 64, 3, 1, 2)
    scores = block_scores(torch.eye(16), 4, rule)
    expected = torch.zeros(16, 4)
    for block in range(4):
        for window, weight in zip(
            range(4 * block - 1, 4 * block + 4), [1, 2, 2, 2, 1], strict=True
        ):
            if 0 <= window < 16:
                expected[window, block] = weight
    assert torch.equal(scores, expected)


@PROPERTY
@given(st.data(), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))
def test_ranking_with_many_ties(data, blocks, init_blocks, local_blocks, more) -> None:
    topk = max(1, init_blocks + local_blocks + more)
    rule = BlockRule(4, 2, 4, topk, init_blocks, local_blocks)
    tokens = list(range(4 * blocks))
    rows = st.lists(st.integers(0, 2), min_size=blocks, max_size=blocks)
    scores = [data.draw(rows) for _ in tokens]
    expected = [
        dense.rank(row, t // 4, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks)
        for row, t in zip(scores, tokens, strict=True)
    ]
    came = select_blocks(torch.tensor([scores]).double(), torch.tensor(tokens), rule)
    assert came[0].tolist() == expected


def test_equal_scores_take_the_lower_index() -> None:
    """All windows score alike; the blocks between the forced ones tie."""
    rule = BlockRule(32, 16, 64, 5, 1, 2)
    tokens = 64 * 9
    q = torch.zeros(tokens, 2, DIM)
    k = torch.randn(35, 1, DIM)
    topk_idx = select(q, k, [tokens], rule)
    assert topk_idx[0, -1].tolist() == [0, 1, 2, 7, 8]


def test_future_blocks_never_push_out_blocks_without_mass() -> None:
    """All of the probability is on one window; the visible rest underflows to 0."""
    rule = BlockRule(4, 4, 4, 4, 0, 0)
    q = torch.ones(40, 1, DIM)
    k = torch.zeros(10, 1, DIM)
    k[0] = 1000.0
    topk_idx = select(q, k, [40], rule)
    assert topk_idx[0, 4 * 3 + 3].tolist() == [0, 1, 2, 3]
    assert topk_idx[0, 4 * 9 + 3].tolist() == [0, 1, 2, 3]
    assert topk_idx[0, 4 * 1].tolist() == [0, 1, -1, -1]


def test_small_probabilities_still_rank_in_low_precision() -> None:
    """Scores kept in float16 would flush these to 0 and take block 1."""
    rule = BlockRule(4, 4, 4, 2, 1, 0)
    q = torch.ones(16, 1, DIM, dtype=torch.float16)
    k = torch.zeros(4, 1, DIM, dtype=torch.float16)
    k[:, 0, 0] = torch.tensor([100.0, 0.0, 20.0, 10.0])
    assert select(q, k, [16], rule)[0, 15].tolist() == [0, 2]


def test_more_blocks_wanted_than_there_are() -> None:
    rule = BlockRule(8, 4, 8, 16, 1, 2)
    topk_idx = select(torch.randn(20, 1, DIM), torch.randn(4, 1, DIM), [20], rule)
    assert topk_idx.shape == (1, 20, 16)
    assert topk_idx[0, 7].tolist() == [0] + [-1] * 15
    assert topk_idx[0, 19].tolist() == [0, 1, 2] + [-1] * 13


def test_sequences_without_windows_take_blocks_by_index() -> None:
    rule = BlockRule(32, 16, 16, 2, 0, 1)
    topk_idx = select(torch.randn(31, 2, DIM), torch.randn(0, 1, DIM), [0, 31, 0], rule)
    assert topk_idx[0, 0].tolist() == [0, -1]
    assert topk_idx[0, 30].tolist() == [0, 1]


def test_chunks_of_a_prompt_select_what_the_whole_selects() -> None:
    """The last queries of each sequence, with their positions and all windows so far."""
    rule, lengths = BlockRule(8, 4, 8, 5, 1, 2), [30, 75]
    ends = offsets(lengths)
    k_ends = reference.compressed_cu_seqlens(ends, rule.kernel_size, rule.kernel_stride)
    q, k = torch.randn(105, 4, DIM), torch.randn(int(k_ends[-1]), 2, DIM)
    _, lse = reference.compressed_attention_forward(
        q, k, k, ends, k_ends, kernel_size=rule.kernel_size, kernel_stride=rule.kernel_stride
    )
    whole = reference.block_selection(q, k, lse, ends, k_ends, **vars(rule))
    late = torch.cat([torch.arange(25, 30), torch.arange(30 + 41, 105)])
    part = (q[late], k, lse[late], offsets([5, 34]), k_ends)
    q_start = torch.tensor([25, 41], dtype=torch.int32)
    came = reference.block_selection(*part, **vars(rule), q_start=q_start)
    assert torch.equal(came, whole[:, late])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"topk": 2}, "init_blocks=1, local_blocks=2"),
        ({"topk": 0, "init_blocks": 0, "local_blocks": 0}, "positive"),
        ({"local_blocks": -1}, "neither negative"),
        ({"block_size": 6}, "multiple of kernel_stride"),
        ({"kernel_size": 6}, "not the other way round"),
    ],
)
def test_wrong_parameters_say_what_to_do(change: dict[str, int], text: str) -> None:
    good = vars(BlockRule(8, 4, 8, 3, 1, 2))
    with pytest.raises(InvalidInputError, match=text):
        BlockRule(**(good | change))
