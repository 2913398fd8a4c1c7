"""A wide local band as dense rows, and the other blocks gathered, against selected attention."""

from __future__ import annotations

import os

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.core.errors import InvalidInputError
from nsagen.ops import local_band, reference
from nsagen.ops.local_band import attend_selected, free_entries
from tests.support import is_hopper

BLOCK, LOCAL, TOPK = 8, 2, 5
CU_SEQLENS = torch.tensor([0, 52, 52, 57], dtype=torch.int32)
TOKENS, HEADS, BLOCKS = 57, 1, 7


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k, v and blocks as selection gives them: the first, the local ones and random others."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(TOKENS, heads, 16) for heads in (2 * HEADS, HEADS, HEADS))
    own = reference.positions_in_sequence(CU_SEQLENS, TOKENS)[:, None] // BLOCK
    block = torch.arange(BLOCKS)
    score = torch.rand(HEADS, TOKENS, BLOCKS).masked_fill((block == 0) | (block > own - LOCAL), 2.0)
    best = score.masked_fill(block > own, -1.0).topk(TOPK)
    chosen = best.indices.masked_fill(best.values < 0, 99).sort(-1).values
    topk_idx = chosen.masked_fill(chosen == 99, -1).to(torch.int32)
    return *(x.to(dtype) for x in (q, k, v)), topk_idx


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_band, "ASKED", "1")


def test_free_entries_are_those_before_the_local_blocks() -> None:
    topk_idx = inputs()[3]
    own = reference.positions_in_sequence(CU_SEQLENS, TOKENS)[:, None] // BLOCK
    expected = torch.where((topk_idx >= 0) & (topk_idx <= own - LOCAL), topk_idx, -1)
    found = free_entries(topk_idx, LOCAL)
    assert found.shape[-1] == TOPK - LOCAL
    assert found.is_contiguous()
    assert torch.equal(torch.cat([found, expected[..., TOPK - LOCAL :]], -1), expected)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
def test_outputs_and_gradients_are_selected_attention_s(asked: None) -> None:
    *tensors, topk_idx = inputs()
    leaves = [x.requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    o = attend_selected(*leaves, topk_idx, BLOCK, LOCAL, CU_SEQLENS)
    expected = reference.topk_sparse_attention(*wide, topk_idx, BLOCK, CU_SEQLENS)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)
    do = torch.randn_like(o)
    found = torch.autograd.grad(o, leaves, do)
    right = torch.autograd.grad(expected, wide, do.double())
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_chunks_and_references_go_the_usual_way(asked: None) -> None:
    *tensors, topk_idx = inputs(torch.float64)
    args = (*tensors, topk_idx, BLOCK, LOCAL, CU_SEQLENS)
    expected = reference.topk_sparse_attention(*tensors, topk_idx, BLOCK, CU_SEQLENS)
    start = torch.zeros(3, dtype=torch.int32)
    for chunk in ({}, {"q_start": start, "cu_seqlens_k": CU_SEQLENS}):
        torch.testing.assert_close(attend_selected(*args, **chunk), expected)


def test_a_window_of_no_whole_blocks_is_refused() -> None:
    *tensors, topk_idx = inputs()
    with pytest.raises(InvalidInputError, match="one or more whole blocks; got 20 and 8"):
        local_band.banded_attention(*tensors, topk_idx, CU_SEQLENS, 20, 8, 0.25)


@pytest.mark.parametrize(
    ("asked", "local_blocks", "topk", "taken"),
    [
        ("", 33, 96, True),
        ("", 33, 64, True),
        ("", 2, 16, False),
        ("", 1, 3, False),
        ("1", 1, 16, True),
        ("0", 33, 96, False),
    ],
)
def test_wide_bands_are_rows_unless_a_variable_says_otherwise(
    asked: str, local_blocks: int, topk: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(local_band, "ASKED", asked)
    monkeypatch.setattr(local_band, "on_kernels", lambda q: True)
    for name in ("banded_attention", "topk_sparse_attention"):
        monkeypatch.setattr(local_band, name, lambda *_, name=name, **__: [found.append(name)])
    *tensors, _ = inputs()
    blocks = torch.full((HEADS, TOKENS, topk), -1, dtype=torch.int32)
    attend_selected(*tensors, blocks, BLOCK, local_blocks, CU_SEQLENS)
    assert found == ["banded_attention" if taken else "topk_sparse_attention"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gpu_that_was_not_measured_takes_the_usual_kernels(dtype: torch.dtype) -> None:
    q = torch.empty(3, 2, 16, dtype=dtype)
    assert not local_band.in_rows("forward", q, q[:, :1], q[:, :1], 64, 8, "")


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="the default on Hopper")
def test_on_hopper_a_wide_band_is_rows_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any variable, forward and backward, beside all blocks gathered."""
    monkeypatch.setattr(local_band, "ASKED", "")
    tokens, block, local, topk = 6000, 64, 33, 64
    ends = torch.tensor([0, 5000, 5001, tokens], dtype=torch.int32, device="cuda")
    torch.manual_seed(1)
    heads = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    leaves = [torch.randn(tokens, n, 128, **heads) for n in (32, 2, 2)]
    own = reference.positions_in_sequence(ends, tokens)[:, None] // block
    number = torch.arange(80, device="cuda")
    score = torch.rand(2, tokens, 80, device="cuda")
    score = score.masked_fill((number == 0) | (number > own - local), 2.0)
    best = score.masked_fill(number > own, -1.0).topk(topk)
    chosen = best.indices.masked_fill(best.values < 0, 99).sort(-1).values
    topk_idx = chosen.masked_fill(chosen == 99, -1).to(torch.int32)
    for pass_ in ("forward", "backward"):
        assert local_band.in_rows(pass_, *leaves, local * block, block, "")
    found = attend_selected(*leaves, topk_idx, block, local, ends)
    monkeypatch.setattr(local_band, "ASKED", "0")
    usual = attend_selected(*leaves, topk_idx, block, local, ends)
    do = torch.randn_like(found)
    pairs = [(found, usual)]
    pairs += zip(*(torch.autograd.grad(o, leaves, do) for o in (found, usual)), strict=True)
    for a, b in pairs:
        assert relative_error(a, b) <= THRESHOLDS[torch.bfloat16]
