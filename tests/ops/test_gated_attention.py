"""Gated attention that never materializes a branch's gradient, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsagen.bench.shape import Inputs, Shape
from nsagen.bench.train import peak_memory
from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.core.branches import BRANCHES
from nsagen.ops import gated_attention, native_sparse_attention, reference
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.layout import compressed_cu_seqlens
from nsagen.ops.native_sparse_attention import add_gradients

from .inputs import STATICS, Packed


def inputs(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    x = Packed(dtype, requires_grad=True)
    offsets = compressed_cu_seqlens(x.cu_seqlens, STATICS["kernel_size"], STATICS["kernel_stride"])
    windows = int(offsets[-1])
    ck = x.randn(windows, x.kv_heads, x.head_dim)
    cv = x.randn(windows, x.kv_heads, x.v_head_dim)
    keywords = {**STATICS, "window_size": 9}
    return [x.q, x.k, x.v, ck, cv, x.gate, x.cu_seqlens, offsets], keywords


def by_ops(args: list[Any], keywords: dict[str, Any]) -> torch.Tensor:
    q, k, v, ck, cv, gate, cu_seqlens, offsets = args
    return attend_branches(
        *(q, (ck, cv), (k, v), (k, v), gate),
        cu_seqlens=cu_seqlens,
        window_cu_seqlens=offsets,
        branches=BRANCHES,
        softmax_scale=q.shape[-1] ** -0.5,
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
    o, expected = by_ops(args, keywords), by_reference(args, keywords)
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


def check_block(run: Callable[..., torch.Tensor]) -> None:
    """The whole block and its gradients."""
    args, keywords = Packed(requires_grad=True).block()
    o = run(*args, **keywords)
    expected = reference.native_sparse_attention(*args, **keywords)
    assert relative_error(o, expected) <= THRESHOLDS[o.dtype]
    gradient = torch.randn_like(o)
    found, right = (torch.autograd.grad(x, args, gradient) for x in (o, expected))
    for ours, theirs in zip(found, right, strict=True):
        assert relative_error(ours, theirs) <= THRESHOLDS[o.dtype]


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_by_kernels(dtype: torch.dtype) -> None:
    check(dtype)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_it_compiles_to_one_graph() -> None:
    check_block(torch.compile(native_sparse_attention, backend="aot_eager", fullgraph=True))


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_where_it_is_taken() -> None:
    """It serves training with all branches on shared keys and values."""

    def is_taken(args: list[Any], keywords: dict[str, Any], **changes: Any) -> bool:
        q, k, v, ck, cv, gate, cu_seqlens, offsets = args
        pairs = {"windows": (ck, cv), "selected": (k, v), "sliding": (k, v)}
        o = attend_branches(
            q,
            gate=gate,
            cu_seqlens=cu_seqlens,
            window_cu_seqlens=offsets,
            softmax_scale=0.25,
            **{**pairs, "branches": BRANCHES, **keywords, **changes},
        )
        return "sum_branches" in str(o.grad_fn)

    args, keywords = inputs(torch.float32)
    assert is_taken(args, keywords)
    assert not is_taken(args, keywords, sliding=(args[1].clone(), args[2]))
    assert not is_taken(args, keywords, branches=("compressed", "selected"))
    starts = torch.zeros(4, dtype=torch.int32)
    assert is_taken(args, keywords, q_start=starts)
    with torch.no_grad():
        assert not is_taken(args, keywords)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("only", [slice(0, 1), slice(5, 6)], ids=["q", "gate"])
def test_one_gradient_alone(only: slice) -> None:
    check(torch.float32, only)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_a_second_derivative_is_refused() -> None:
    args, keywords = inputs(torch.float32)
    o = by_ops(args, keywords)
    (dq,) = torch.autograd.grad((o * o).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_no_branch_is_kept_for_the_attention() -> None:
    """Of the branches' outputs only the sum keeps any: they are free when its gradient is done."""
    args, keywords = inputs(torch.float32)
    o = by_ops(args, keywords)
    node: Any = o.grad_fn
    (attention,) = {n for n, _ in node.next_functions if "branches_forward" in str(n)}
    saved = [x for x in attention.saved_tensors if x is not None]
    assert not any(x.ndim == 3 and x.shape == o.shape for x in saved)
    q_like = [x for x in saved if x.data_ptr() == args[0].data_ptr()]
    assert len(q_like) == 1


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_a_branchs_delta_is_not_copied_while_outputs_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The outputs are freed after the sum's gradient; a copy before that would raise the peak."""
    columns, handed = gated_attention.branch_columns, list[torch.Tensor]()

    def watched(gate: torch.Tensor, *deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        handed.extend(deltas)
        return columns(gate, *deltas)

    monkeypatch.setattr(gated_attention, "branch_columns", watched)
    args, keywords = inputs(torch.float32)
    by_ops(args, keywords).sum().backward()
    assert len(handed) == 3
    assert len({delta.untyped_storage().data_ptr() for delta in handed}) == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 700])
def test_small_kernels_give_pytorchs_bits(dtype: torch.dtype, tokens: int) -> None:
    """Columns that lie 4 bytes apart, a gate that lies in another order, sums of two sizes."""
    gate = torch.randn(1, tokens, 3, dtype=dtype).transpose(0, 1)
    deltas = torch.randn(tokens, 1, 3).unbind(-1)
    columns, dgate = gated_attention.branch_columns(gate, *deltas)
    assert torch.equal(columns, torch.stack([x.float() for x in (*gate.unbind(-1), *deltas)]))
    assert torch.equal(dgate, torch.stack(deltas, -1).to(dtype))
    dk, of_k = torch.randn(2, tokens, 2, 16, dtype=dtype)
    dv, of_v = torch.randn(2, tokens, 2, 24, dtype=dtype)
    expected = (dk + of_k, dv + of_v)
    add_gradients(dk, of_k, dv, of_v)
    assert torch.equal(dk, expected[0])
    assert torch.equal(dv, expected[1])


@pytest.mark.gpu
def test_memory_of_65536_tokens() -> None:
    """Apart from inputs, output and gradients: at most the outputs of two branches."""
    x = Inputs.random(Shape(), 65536, requires_grad=True)
    assert peak_memory(x) <= 2.0
