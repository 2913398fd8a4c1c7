"""The references of the block-sparse family against plain formulations, and MiniMax-M3's indexer.

Block scores are compared as sets of scores where ties are structural.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference
from nsagen.ops.reference import _attend
from nsagen.ops.reference.block_selection import SCORE_HEADS, Scoring
from tests.ops import dense
from tests.ops.dense import HEADS, PROPERTY, SEQLENS, offsets, windows_and_blocks

DIM = 8
FORMS = [
    ("softmax", "sum", "max"),
    ("softmax", "each", "overlap"),
    ("softmax", "each", "max"),
    ("none", "sum", "max"),
    ("none", "each", "max"),
]


def plain_blocks(
    q: Tensor,
    k: Tensor,
    seqlens: list[int],
    shape: tuple[int, int, int],
    form: tuple[str, str, str],
    **rule: int,
) -> list[list[list[int]]]:
    """One query, one row and one block at a time, with sets of tokens."""
    (size, stride, block), (norm, heads, pool) = shape, form
    group = q.shape[1] // k.shape[1]
    sets = [[h] for h in range(q.shape[1])]
    if heads == "sum":
        sets = [list(range(r * group, (r + 1) * group)) for r in range(k.shape[1])]
    result: list[list[list[int]]] = [[] for _ in sets]
    start = first = 0
    for length in seqlens:
        count = dense.window_count(length, size, stride)
        for t in range(length):
            seen = [i for i in range(count) if i * stride + size - 1 <= t]
            for r, members in enumerate(sets):
                total = [0.0] * len(seen)
                for h in members:
                    dots = [float(q[start + t, h] @ k[first + i, h // group]) for i in seen]
                    if norm == "softmax":
                        weights = [math.exp(dot * q.shape[-1] ** -0.5) for dot in dots]
                        dots = [w / sum(weights) for w in weights]
                    total = [a + b for a, b in zip(total, dots, strict=True)]
                scores = []
                for j in range(t // block + 1):
                    touching = {
                        i: len(
                            set(range(i * stride, i * stride + size))
                            & set(range(j * block, (j + 1) * block))
                        )
                        for i in seen
                    }
                    values = [
                        (total[n], touching[i] / stride) for n, i in enumerate(seen) if touching[i]
                    ]
                    if pool == "overlap":
                        scores.append(sum(a * b for a, b in values))
                    else:
                        least = 0.0 if norm == "softmax" else -math.inf
                        scores.append(max((a for a, _ in values), default=least))
                result[r].append(dense.rank(scores, t // block, **rule))
        start, first = start + length, first + count
    return result


def selection(
    q: Tensor,
    k: Tensor,
    seqlens: list[int],
    shape: tuple[int, int, int],
    form: tuple[str, str, str],
    **rule: int,
) -> Tensor:
    ends = offsets(seqlens)
    k_ends = reference.compressed_cu_seqlens(ends, *shape[:2])
    windows = {"kernel_size": shape[0], "kernel_stride": shape[1]}
    lse = None
    if form[0] == "softmax":
        lse = reference.compressed_lse(q, k, ends, k_ends, **windows)
    return reference.block_selection(
        q,
        k,
        lse,
        ends,
        k_ends,
        **windows,
        block_size=shape[2],
        **rule,
        **vars(Scoring(*form)),
    )


@PROPERTY
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(sum),
    HEADS,
    windows_and_blocks(),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)),
    st.sampled_from(FORMS),
    st.sampled_from([1 << 24, 200]),
)
def test_every_form_matches_the_formula(
    seqlens: list[int],
    heads: tuple[int, int],
    shape: tuple[int, int, int],
    forced: tuple[int, int, int],
    form: tuple[str, str, str],
    max_scores: int,
) -> None:
    init_blocks, local_blocks, more = forced
    rule = {"init_blocks": init_blocks, "local_blocks": local_blocks}
    rule["topk"] = max(1, init_blocks + local_blocks + more)
    windows = sum(dense.window_count(length, *shape[:2]) for length in seqlens)
    torch.manual_seed(0)
    q = torch.randn(sum(seqlens), heads[0], DIM, dtype=torch.float64)
    k = torch.randn(windows, heads[1], DIM, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attend, "MAX_SCORES", max_scores)
        came = selection(q, k, seqlens, shape, form, **rule)
    assert came.tolist() == plain_blocks(q, k, seqlens, shape, form, **rule)


def test_nsas_form_with_heads_apart_is_nsa_on_groups_of_one() -> None:
    q, k = torch.randn(50, 6, DIM), torch.randn(11, 2, DIM)
    shape, rule = (8, 4, 8), {"topk": 3, "init_blocks": 1, "local_blocks": 1}
    apart = selection(q, k, [50], shape, ("softmax", "each", "overlap"), **rule)
    repeated = k.repeat_interleave(3, 1)
    assert torch.equal(
        apart, selection(q, repeated, [50], shape, ("softmax", "sum", "overlap"), **rule)
    )


def test_a_window_that_straddles_two_blocks_counts_for_both() -> None:
    """Window 4j + 3 of 32/16/64 is the maximum of blocks j and j + 1: a tie, to the lower index."""
    q = torch.zeros(64 * 6, 1, DIM)
    q[..., 0] = 1.0
    k = torch.zeros(23, 1, DIM)
    k[7, 0, 0] = 10.0  # tokens 112 .. 143: of blocks 1 and 2
    rule = {"init_blocks": 0, "local_blocks": 1}
    came = selection(q, k, [384], (32, 16, 64), ("softmax", "sum", "max"), topk=3, **rule)
    assert came[0, -1].tolist() == [1, 2, 5]
    came = selection(q, k, [384], (32, 16, 64), ("softmax", "sum", "max"), topk=2, **rule)
    assert came[0, -1].tolist() == [1, 5]


def test_negative_products_rank_below_nothing() -> None:
    """All visible blocks score less than 0 and still come before future ones."""
    q, k = torch.ones(12, 1, DIM), -torch.rand(12, 1, DIM)
    came = selection(
        q, k, [12], (1, 1, 2), ("none", "sum", "max"), topk=4, init_blocks=0, local_blocks=0
    )
    assert (came[0, 5] >= 0).sum() == 3
    assert (came[0, 11] >= 0).all()


@PROPERTY
@given(SEQLENS, HEADS, windows_and_blocks(), st.sampled_from([1 << 24, 200]))
def test_the_log_sum_exp_alone(
    seqlens: list[int], heads: tuple[int, int], shape: tuple[int, int, int], max_scores: int
) -> None:
    size, stride, _ = shape
    windows = sum(dense.window_count(length, size, stride) for length in seqlens)
    torch.manual_seed(0)
    q = torch.randn(sum(seqlens), heads[0], DIM, dtype=torch.float64)
    k = torch.randn(windows, heads[1], DIM, dtype=torch.float64)
    _, expected, _ = dense.attention(q, k, k, dense.window_mask(seqlens, size, stride), DIM**-0.5)
    ends = offsets(seqlens)
    k_ends = reference.compressed_cu_seqlens(ends, size, stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attend, "MAX_SCORES", max_scores)
        came = reference.compressed_lse(q, k, ends, k_ends, kernel_size=size, kernel_stride=stride)
    torch.testing.assert_close(came, expected)


def test_coarse_keys_normalize_nearly() -> None:
    """Windows of 4 l every 4 s change the weights of a group's heads, not what a head prefers."""
    torch.manual_seed(0)
    q, k, ends = torch.randn(600, 4, 16), torch.randn(600, 1, 16), offsets([600])
    fine, fine_ends = reference.avgpool_compress(k, None, ends, 8, 4)
    coarse, coarse_ends = reference.avgpool_compress(k, None, ends, 32, 16)
    exact = reference.compressed_lse(q, fine, ends, fine_ends, kernel_size=8, kernel_stride=4)
    near = reference.compressed_lse(q, coarse, ends, coarse_ends, kernel_size=32, kernel_stride=16)
    assert near[:31].isneginf().all()
    more = math.log(4)  # fine windows for each coarse one
    assert (near[200:] + more - exact[200:]).abs().mean() < 0.2
    rule = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "topk": 8}
    form = {"score_pool": "max"}
    chosen = [
        reference.block_selection(q, fine, lse, ends, fine_ends, **rule, **form)[0, 200:]
        for lse in (exact, near)
    ]
    same = [
        len(set(a) & set(b)) / 8
        for a, b in zip(chosen[0].tolist(), chosen[1].tolist(), strict=True)
    ]
    assert sum(same) / len(same) > 0.95


def test_rows_without_a_coarse_key_take_blocks_by_index() -> None:
    q, k = torch.randn(20, 1, DIM), torch.randn(20, 1, DIM)
    ends, lse = offsets([20]), torch.full((20, 1), -math.inf)
    rule = {"kernel_size": 1, "kernel_stride": 1, "block_size": 2, "topk": 3, "init_blocks": 0}
    came = reference.block_selection(q, k, lse, ends, ends, **rule, local_blocks=1)
    assert came[0, 19].tolist() == [0, 1, 9]


@pytest.mark.parametrize("left_out", [True, False])
def test_only_a_softmax_takes_a_log_sum_exp(left_out: bool) -> None:
    q, ends = torch.randn(4, 1, DIM), offsets([4])
    lse, norm = (None, "softmax") if left_out else (torch.zeros(4, 1), "none")
    form = {"score_norm": norm, "score_pool": "max"}
    rule = {"kernel_size": 1, "kernel_stride": 1, "block_size": 2, "topk": 3}
    with pytest.raises(InvalidInputError, match="lse must be given with score_norm 'softmax'"):
        reference.block_selection(q, q, lse, ends, ends, **rule, **form)


@pytest.mark.parametrize("heads", SCORE_HEADS)
def test_sums_of_raw_products_are_refused(heads: str) -> None:
    with pytest.raises(InvalidInputError, match="score_pool 'overlap' needs score_norm 'softmax'"):
        Scoring("none", heads, "overlap")


class TestMiniMaxM3:
    """Transformers' indexer on a small random configuration."""

    def indexer(self, rotary: float = 0.5) -> tuple[torch.nn.Module, Tensor, tuple[Tensor, Tensor]]:
        module = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
        config = module.MiniMaxM3VLTextConfig(
            hidden_size=24,
            index_head_dim=16,
            index_n_heads=2,
            index_block_size=4,
            index_topk_blocks=3,
            index_local_blocks=1,
        )
        torch.manual_seed(0)
        indexer = module.MiniMaxM3VLIndexer(config, 3)
        for norm in (indexer.q_norm, indexer.k_norm):
            torch.nn.init.normal_(norm.weight, std=0.3)
        x = torch.randn(1, 37, 24)
        angles = torch.arange(37.0)[:, None] / 100 ** torch.linspace(0, 1, int(16 * rotary / 2))
        return indexer, x, (angles.cos(), angles.sin())

    def inputs(
        self, indexer: torch.nn.Module, x: Tensor, tables: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        positions = torch.arange(x.shape[1], dtype=torch.int32)
        found = []
        for proj, norm in ((indexer.q_proj, indexer.q_norm), (indexer.k_proj, indexer.k_norm)):
            heads = proj(x[0]).unflatten(-1, (-1, 16))
            found.append(reference.norm_rope(heads, norm.weight, *tables, positions, eps=norm.eps))
        return found

    @torch.no_grad()
    @pytest.mark.parametrize("rotary", [0.5, 1.0])
    def test_its_blocks(self, rotary: float) -> None:
        indexer, x, tables = self.indexer(rotary)
        cos, sin = (torch.cat((table, table), -1)[None] for table in tables)
        expected = indexer(x, (cos, sin), None, torch.arange(37)[None])[0].sort(-1, descending=True)
        q, k = self.inputs(indexer, x, tables)
        ends = offsets([37])
        came = reference.block_selection(
            *(q, k, None, ends, ends),
            **{"kernel_size": 1, "kernel_stride": 1, "block_size": 4, "topk": 3},
            **{"init_blocks": 0, "local_blocks": 1},
            **vars(Scoring("none", "each", "max")),
        )
        assert torch.equal(came.sort(-1, descending=True).values, expected.values.int())


class TestIndexLoss:
    def inputs(self, seqlens: list[int]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        tokens = sum(seqlens)
        shapes = {"q": 4, "k": 2, "index_q": 2, "index_k": 1}
        return {
            name: torch.randn(tokens, heads, DIM, dtype=torch.float64, requires_grad=True)
            for name, heads in shapes.items()
        }

    def plain(
        self, x: dict[str, Tensor], topk_idx: Tensor | None, seqlens: list[int], block: int
    ) -> Tensor:
        """Whole [N, N] masks, and PyTorch's own divergence."""
        mask = dense.token_mask(seqlens, lambda t, u: torch.ones(1, dtype=torch.bool))[None]
        if topk_idx is not None:
            mask = dense.selected_mask(topk_idx, seqlens, block, 1)
        mask = mask.expand(2, -1, -1)
        wide = mask.repeat_interleave(2, 0)
        k = x["k"].detach()
        _, _, p = dense.attention(x["q"].detach(), k, k, wide, DIM**-0.5)
        teacher = p.unflatten(0, (2, 2)).mean(1)
        _, _, student = dense.attention(x["index_q"], x["index_k"], x["index_k"], mask, DIM**-0.5)
        student = torch.where(mask, student, 1.0)  # the logarithm of nothing has a gradient
        losses = torch.nn.functional.kl_div(student.log(), teacher, reduction="none")
        return losses.sum(-1)

    @pytest.mark.parametrize("warm_up", [False, True])
    @pytest.mark.parametrize("max_scores", [1 << 24, 100])
    def test_it_is_the_divergence(
        self, warm_up: bool, max_scores: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_attend, "MAX_SCORES", max_scores)
        seqlens, block = [0, 9, 1, 17], 4
        x, ends = self.inputs(seqlens), offsets(seqlens)
        topk_idx = reference.block_selection(
            *(x["index_q"], x["index_k"], None, ends, ends),
            **{"kernel_size": 1, "kernel_stride": 1, "block_size": block, "topk": 2},
            **{"init_blocks": 0, "local_blocks": 1},
            **vars(Scoring("none", "each", "max")),
        )
        chosen = None if warm_up else topk_idx
        loss = reference.index_loss(*x.values(), chosen, ends, block_size=block)
        expected = self.plain(x, chosen, seqlens, block)
        torch.testing.assert_close(loss, expected)
        assert (loss > -1e-12).all()
        weight = torch.rand_like(loss)
        learning = (x["index_q"], x["index_k"])
        came = torch.autograd.grad((loss * weight).sum(), learning, retain_graph=True)
        torch.testing.assert_close(came, torch.autograd.grad((expected * weight).sum(), learning))

    def test_only_the_index_learns(self) -> None:
        x, ends = self.inputs([12]), offsets([12])
        loss = reference.index_loss(*x.values(), None, ends, block_size=4)
        loss.sum().backward()
        assert x["q"].grad is None
        assert x["k"].grad is None
        assert x["index_q"].grad.abs().sum() > 0
        assert x["index_k"].grad.abs().sum() > 0

    def test_a_query_without_blocks_loses_nothing(self) -> None:
        x, ends = self.inputs([6]), offsets([6])
        topk_idx = torch.full((2, 6, 2), -1, dtype=torch.int32)
        loss = reference.index_loss(*x.values(), topk_idx, ends, block_size=2)
        loss.sum().backward()
        assert torch.equal(loss, torch.zeros(2, 6, dtype=torch.float64))
        assert torch.equal(x["index_q"].grad, torch.zeros_like(x["index_q"]))

    def test_an_index_like_the_attention_has_nothing_to_learn(self) -> None:
        q, k = torch.randn(10, 1, DIM), torch.randn(10, 1, DIM)
        loss = reference.index_loss(q, k, q, k, None, offsets([10]), block_size=4)
        assert loss.abs().max() < 1e-5

    def test_one_index_head_a_key_head(self) -> None:
        x = self.inputs([5])
        x["index_q"] = torch.randn(5, 4, DIM)
        with pytest.raises(InvalidInputError, match="one index head per key/value head"):
            reference.index_loss(*x.values(), None, offsets([5]), block_size=4)
