"""The three attention branches against whole [N, N] masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference
from nsagen.ops.reference import _attend
from tests.ops import dense
from tests.ops.dense import HEADS, PROPERTY, SEQLENS, offsets, windows_and_blocks

DIM, VALUE_DIM = 8, 6


def close(came: Tensor, expected: Tensor) -> None:
    assert came.shape == expected.shape
    torch.testing.assert_close(came, expected, rtol=1e-11, atol=1e-12)


def inputs(
    queries: int, keys: int, heads: tuple[int, int], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    shapes = ((queries, query_heads, DIM), (keys, kv_heads, DIM), (keys, kv_heads, VALUE_DIM))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q, k, v


@pytest.fixture(params=[1 << 24, 64], ids=["whole", "chunked"])
def max_scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Once with a sequence in one piece, once a few queries at a time."""
    monkeypatch.setattr(_attend, "MAX_SCORES", request.param)
    return request.param


def gradients(o: Tensor, *wrt: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(
        (o * torch.randn(o.shape, dtype=o.dtype)).sum(), wrt, retain_graph=True
    )


@PROPERTY
@given(SEQLENS, HEADS, st.integers(1, 50), st.sampled_from([None, 0.3]))
def test_sliding_window(
    seqlens: list[int], heads: tuple[int, int], window: int, scale: float | None
) -> None:
    tokens = sum(seqlens)
    q, k, v = inputs(tokens, tokens, heads)
    mask = dense.token_mask(seqlens, lambda t, u: u > t - window)
    o, lse, _ = dense.attention(q, k, v, mask, DIM**-0.5 if scale is None else scale)
    came = reference.sliding_window_attention_forward(
        q, k, v, offsets(seqlens), window_size=window, softmax_scale=scale
    )
    close(came[0], o)
    close(came[1], lse)
    close(reference.sliding_window_attention(q, k, v, window, offsets(seqlens), scale), o)


def test_a_window_of_w_tokens_holds_w_tokens() -> None:
    """FlashAttention's window_size=(W, -1) means W + 1 keys; here W counts the query's own."""
    q = torch.zeros(6, 1, DIM)
    v = torch.eye(6).unsqueeze(1)
    o = reference.sliding_window_attention(q, q, v, 3, offsets([6]))
    assert torch.equal(o[5, 0] > 0, torch.tensor([False, False, False, True, True, True]))
    assert torch.equal(
        reference.sliding_window_attention(q, q, v, 1, offsets([6]))[:, 0], torch.eye(6)
    )


@PROPERTY
@given(SEQLENS, HEADS, windows_and_blocks(), st.integers(0, 3), st.sampled_from([None, 0.3]))
def test_compressed(
    seqlens: list[int],
    heads: tuple[int, int],
    shape: tuple[int, int, int],
    spare: int,
    scale: float | None,
) -> None:
    size, stride, _ = shape
    k_offsets = reference.compressed_cu_seqlens(offsets(seqlens), size, stride)
    windows = int(k_offsets[-1])
    q, k, v = inputs(sum(seqlens), windows + spare, heads)
    k[windows:] = v[windows:] = float("nan")  # rows past the last window are never read
    mask = dense.window_mask(seqlens, size, stride)
    o, lse, _ = dense.attention(
        q, k[:windows], v[:windows], mask, DIM**-0.5 if scale is None else scale
    )
    came = reference.compressed_attention_forward(
        q,
        k,
        v,
        offsets(seqlens),
        k_offsets,
        kernel_size=size,
        kernel_stride=stride,
        softmax_scale=scale,
    )
    close(came[0], o)
    close(came[1], lse)


@pytest.mark.parametrize("chunk", [[0, 7, 11], [4, 11], [11, 11]])
def test_chunks_give_what_the_whole_prompt_gives(chunk: list[int]) -> None:
    """Chunk after chunk, each with all keys so far, beside a sequence that is whole at once."""
    q, k, v = inputs(16, 16, (4, 2))
    ck, cv = (x[:8] for x in inputs(16, 16, (4, 2), seed=1)[1:])
    k_ends, sizes = offsets([5, 3]), {"kernel_size": 4, "kernel_stride": 2}
    whole = reference.sliding_window_attention_forward(q, k, v, offsets([11, 5]), window_size=4)
    compressed = reference.compressed_attention_forward(
        q, ck, cv, offsets([11, 5]), k_ends, **sizes
    )
    for first, end in itertools.pairwise([0, *chunk]):
        rows = torch.cat([torch.arange(first, end), torch.arange(11, 16)])
        keys = torch.cat([torch.arange(end), torch.arange(11, 16)])
        q_ends, q_start = offsets([end - first, 5]), torch.tensor([first, 0], dtype=torch.int32)
        came = reference.sliding_window_attention_forward(
            q[rows],
            k[keys],
            v[keys],
            q_ends,
            window_size=4,
            cu_seqlens_k=offsets([end, 5]),
            q_start=q_start,
        )
        for ours, right in zip(came, whole, strict=True):
            close(ours, right[rows])
        came = reference.compressed_attention_forward(
            q[rows], ck, cv, q_ends, k_ends, **sizes, q_start=q_start
        )
        for ours, right in zip(came, compressed, strict=True):
            close(ours, right[rows])


def test_a_window_is_visible_from_its_last_token_on() -> None:
    q, k, v = inputs(12, 2, (2, 1))
    o, lse = reference.compressed_attention_forward(
        q, k, v, offsets([12]), offsets([2]), kernel_size=8, kernel_stride=4
    )
    assert not o[:7].any()
    assert torch.equal(lse[:7], torch.full((7, 2), -torch.inf, dtype=torch.float64))
    close(o[7:11], v[0].expand(4, 2, -1))
    assert not torch.allclose(o[11], v[0].expand(2, -1))


@PROPERTY
@given(SEQLENS, HEADS, st.integers(1, 20), st.integers(1, 5), st.randoms(use_true_random=False))
def test_selected(seqlens, heads, block_size, topk, random) -> None:
    """Any index may come: repeated, unsorted, negative, past the end, in the future."""
    tokens, (query_heads, kv_heads) = sum(seqlens), heads
    q, k, v = inputs(tokens, tokens, heads)
    topk_idx = torch.tensor(
        [
            [[random.randint(-2, 6) for _ in range(topk)] for _ in range(tokens)]
            for _ in range(kv_heads)
        ],
        dtype=torch.int32,
    )
    mask = dense.selected_mask(topk_idx, seqlens, block_size, query_heads // kv_heads)
    o, lse, _ = dense.attention(q, k, v, mask, DIM**-0.5)
    came = reference.selected_attention(q, k, v, topk_idx, offsets(seqlens), block_size=block_size)
    close(came[0], o)
    close(came[1], lse)
    assert came[0].is_contiguous()
    assert came[1].is_contiguous()
    close(reference.topk_sparse_attention(q, k, v, topk_idx, block_size, offsets(seqlens)), o)


def test_huge_indices_are_ignored() -> None:
    q, k, v = inputs(8, 8, (2, 1))
    wild = torch.tensor([2**31 - 1, -(2**31), 0], dtype=torch.int32).expand(1, 8, 3)
    plain = torch.zeros(1, 8, 1, dtype=torch.int32)
    close(
        reference.topk_sparse_attention(q, k, v, wild, 4, offsets([8])),
        reference.topk_sparse_attention(q, k, v, plain, 4, offsets([8])),
    )


def test_rows_with_nothing_selected_are_zero_and_have_zero_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(8, 8, (2, 1)))
    topk_idx = torch.full((1, 8, 2), -1, dtype=torch.int32)
    topk_idx[0, 5, 0] = 1
    o, lse = reference.selected_attention(q, k, v, topk_idx, offsets([8]), block_size=4)
    seen = torch.arange(8) == 5
    assert not o[~seen].any()
    assert torch.equal(lse.isneginf().all(-1), ~seen)
    for gradient, touched in zip(gradients(o, q, k, v), ([5], [4, 5], [4, 5]), strict=True):
        assert not gradient.isnan().any()
        assert gradient.flatten(1).any(1).nonzero().flatten().tolist() == touched
    assert not any(g.isnan().any() for g in torch.autograd.grad(lse[5].sum(), (q, k)))


@pytest.mark.parametrize("seqlens", [[11, 0, 3, 9], [2], [0]])
def test_gradients_match_the_dense_masks(seqlens: list[int], max_scores: int) -> None:
    tokens, heads = sum(seqlens), (4, 2)
    leaves = [x.requires_grad_() for x in inputs(tokens, tokens, heads)]
    k_offsets = reference.compressed_cu_seqlens(offsets(seqlens), 4, 2)
    compressed = [x.requires_grad_() for x in inputs(tokens, int(k_offsets[-1]), heads)]
    topk_idx = torch.randint(-1, 4, (2, tokens, 2), dtype=torch.int32)
    sliding = dense.token_mask(seqlens, lambda t, u: u > t - 3)
    selected = dense.selected_mask(topk_idx, seqlens, 4, 2) if tokens else sliding
    cases = [
        (
            leaves,
            sliding,
            reference.sliding_window_attention(*leaves, 3, offsets(seqlens)),
        ),
        (
            leaves,
            selected,
            reference.topk_sparse_attention(*leaves, topk_idx, 4, offsets(seqlens)),
        ),
        (
            compressed,
            dense.window_mask(seqlens, 4, 2),
            reference.compressed_attention_forward(
                *compressed, offsets(seqlens), k_offsets, kernel_size=4, kernel_stride=2
            )[0],
        ),
    ]
    for wrt, mask, o in cases:
        expected, _, _ = dense.attention(*wrt, mask, DIM**-0.5)
        close(o, expected)
        for came, right in zip(gradients(o, *wrt), gradients(expected, *wrt), strict=True):
            close(came, right)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_with_nothing_to_attend_make_no_nan_on_the_way() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(6, 6, (2, 1)))
    nothing = torch.full((1, 6, 1), -1, dtype=torch.int32)
    with torch.autograd.detect_anomaly(check_nan=True):
        o = reference.topk_sparse_attention(q, k, v, nothing, 4, offsets([6]))
        assert not any(gradient.any() for gradient in gradients(o, q, k, v))


def test_gradcheck() -> None:
    wrt = tuple(x.requires_grad_() for x in inputs(5, 5, (2, 1)))
    topk_idx = torch.tensor([[0, -1], [-1, -1], [1, 0], [1, 1], [0, 2]], dtype=torch.int32)[None]
    ends = offsets([3, 2])

    def outputs(*wrt: Tensor) -> list[Tensor]:
        o, lse = reference.selected_attention(*wrt, topk_idx, ends, block_size=2)
        found = ~lse.isneginf()
        sliding = reference.sliding_window_attention_forward(*wrt, ends, window_size=2)
        return [o, lse[found], *sliding]

    assert torch.autograd.gradcheck(outputs, wrt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_at_least_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(20, 20, (4, 2)))
    o, lse = reference.sliding_window_attention_forward(q, k, v, offsets([20]), window_size=7)
    wide, wide_lse = reference.sliding_window_attention_forward(
        q.float(), k.float(), v.float(), offsets([20]), window_size=7
    )
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(o, wide.to(dtype))
    assert torch.equal(lse, wide_lse)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = inputs(6, 6, (1, 1))
    o = reference.sliding_window_attention(100 * q, 100 * k, v, 6, offsets([6]))
    assert o.isfinite().all()


def test_views_with_any_stride() -> None:
    parts = torch.randn(10, 4, DIM, dtype=torch.float64).split((2, 1, 1), 1)
    came = reference.sliding_window_attention(*parts, 4, offsets([10]))
    whole = [part.contiguous() for part in parts]
    close(came, reference.sliding_window_attention(*whole, 4, offsets([10])))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"window_size": 0}, "counts the query's own token"),
        ({"k": torch.ones(8, 3, DIM), "v": torch.ones(8, 3, DIM)}, "multiple of key/value heads"),
        ({"k": torch.ones(8, 2, 4)}, r"got q \(8, 4, 8\), k \(8, 2, 4\)"),
        ({"cu_seqlens": offsets([9])}, "number of tokens, 8"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "must start at 0"),
    ],
)
def test_wrong_inputs_say_what_to_do(change: dict[str, object], text: str) -> None:
    good = {
        "q": torch.ones(8, 4, DIM),
        "k": torch.ones(8, 2, DIM),
        "v": torch.ones(8, 2, DIM),
        "window_size": 4,
        "cu_seqlens": offsets([8]),
    }
    reference.sliding_window_attention(**good)
    with pytest.raises(InvalidInputError, match=text):
        reference.sliding_window_attention(**(good | change))


def test_selected_blocks_must_fit_the_queries() -> None:
    q, k, v = inputs(8, 8, (2, 1))
    with pytest.raises(InvalidInputError, match=r"HK=1 and N=8; got \(8, 1, 3\)"):
        reference.topk_sparse_attention(
            q, k, v, torch.zeros(8, 1, 3, dtype=torch.int32), 4, offsets([8])
        )
