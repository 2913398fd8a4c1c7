"""Attention whose gradients never take the form of a branch's, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nsagen.branches import BRANCHES
from nsagen.errors import InvalidInputError
from nsagen.harness.base import THRESHOLDS, relative_error
from nsagen.ops import native_sparse_attention, reference
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.gated_attention import gated_attention
from nsagen.ops.layout import compressed_cu_seqlens

from .inputs import STATICS, Packed


def inputs(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    x = Packed(dtype, requires_grad=True)
    offsets = compressed_cu_seqlens(x.cu_seqlens, STATICS["kernel_size"], STATICS["kernel_stride"])
    windows = int(offsets[-1])
    ck = x.randn(windows, x.kv_heads, x.head_dim)
    cv = x.randn(windows, x.kv_heads, x.v_head_dim)
    keywords = {**STATICS, "window_size": 9}
    return [x.q, x.k, x.v, ck, cv, x.gate, x.cu_seqlens, offsets], keywords


def by_switch(args: list[Any], keywords: dict[str, Any]) -> torch.Tensor:
    q, k, v, ck, cv, gate, cu_seqlens, offsets = args
    return attend_branches(
        *(q, (ck, cv), (k, v), (k, v), gate),
        cu_seqlens=cu_seqlens,
        window_cu_seqlens=offsets,
        branches=BRANCHES,
        softmax_scale=q.shape[-1] ** -0.5,
        save_memory=True,
        **keywords,
    )


def by_reference(args: list[Any], keywords: dict[str, Any]) -> torch.Tensor:
    q, k, v, ck, cv, gate, cu_seqlens, offsets = args
    selection = {name: keywords[name] for name in STATICS}
    o_compressed, topk_idx = reference.compressed_attention(
        q, ck, cv, cu_seqlens_q=cu_seqlens, cu_seqlens_k=offsets, **selection
    )
    o_selected = reference.topk_sparse_attention(
        q, k, v, topk_idx, keywords["block_size"], cu_seqlens
    )
    o_sliding = reference.sliding_window_attention(q, k, v, keywords["window_size"], cu_seqlens)
    return reference.gated_sum(o_compressed, o_selected, o_sliding, gate)


def check(dtype: torch.dtype, only: slice = slice(None)) -> None:
    """Output and gradients; gates of both signs, and some of 0."""
    args, keywords = inputs(dtype)
    with torch.no_grad():
        args[5][::3, ::2] = 0.0
    o, expected = by_switch(args, keywords), by_reference(args, keywords)
    assert relative_error(o, expected) <= THRESHOLDS[dtype]
    gradient = torch.randn_like(o)
    leaves = args[:6][only]
    found = torch.autograd.grad(o, leaves, gradient)
    right = torch.autograd.grad(expected, leaves, gradient)
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= THRESHOLDS[dtype]


def test_without_kernels() -> None:
    check(torch.float32)


def check_block(dtype: torch.dtype) -> None:
    """The whole block, with and without the switch."""
    args, keywords = Packed(dtype, requires_grad=True).block()
    o = [native_sparse_attention(*args, **keywords, save_memory=on) for on in (True, False)]
    assert relative_error(*o) <= THRESHOLDS[dtype]
    gradient = torch.randn_like(o[0])
    found, right = (torch.autograd.grad(x, args, gradient) for x in o)
    for ours, theirs in zip(found, right, strict=True):
        assert relative_error(ours, theirs) <= THRESHOLDS[dtype]


def test_the_switch_changes_no_result() -> None:
    check_block(torch.float32)


def test_the_switch_needs_all_branches() -> None:
    args, keywords = Packed().block()
    keywords["branches"] = ("selected", "sliding")
    with pytest.raises(InvalidInputError, match="needs every branch; got selected, sliding; turn"):
        native_sparse_attention(*args, **keywords, save_memory=True)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder: Path = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(folder))


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_by_kernels(dtype: torch.dtype) -> None:
    check(dtype)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_the_switch_changes_no_result_of_kernels() -> None:
    check_block(torch.float32)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("only", [slice(0, 1), slice(5, 6)], ids=["q", "gate"])
def test_one_gradient_alone(only: slice) -> None:
    check(torch.float32, only)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_no_branch_is_kept_for_the_attention() -> None:
    """Of the branches' outputs only the sum keeps any: they are free when its gradient is done."""
    args, keywords = inputs(torch.float32)
    o = gated_attention(*args, **keywords)
    node: Any = o.grad_fn
    (attention,) = {n for n, _ in node.next_functions if "branches_forward" in str(n)}
    outputs = [x for x in attention.saved_tensors if x.ndim == 3 and x.shape == o.shape]
    assert not outputs
    q_like = [x for x in attention.saved_tensors if x.data_ptr() == args[0].data_ptr()]
    assert len(q_like) == 1
