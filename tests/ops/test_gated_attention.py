"""Gated attention that never materializes a branch's gradient, against the reference."""

from __future__ import annotations

import os
import weakref
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
from nsagen.ops.native_sparse_attention import finish_gradients, turn_back

from .fixed_kernels import compile_fixed
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
        return "branches_forward" in str(o.grad_fn)

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


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many outputs of branches were in memory when the attention's gradients began."""
    outputs: list[weakref.ref[torch.Tensor]] = []
    summed = gated_attention.gated_sum_forward
    gradients = gated_attention.selected_attention_backward
    alive: list[int] = []

    def watched_sum(*args: Any) -> torch.Tensor:
        outputs.extend(weakref.ref(x) for x in args[:3])
        return summed(*args)

    def watched_gradients(*args: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        alive.append(sum(output() is not None for output in outputs))
        return gradients(*args, **named)

    monkeypatch.setattr(gated_attention, "gated_sum_forward", watched_sum)
    monkeypatch.setattr(gated_attention, "selected_attention_backward", watched_gradients)
    return alive.pop


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_branches_are_free_while_the_attentions_gradients_are_computed(
    held: Callable[[], int],
) -> None:
    """Only delta is left of them, unless the graph is kept for another pass."""
    args, keywords = inputs(torch.float32)
    o = by_ops(args, keywords)
    (dq,) = torch.autograd.grad(o.sum(), args[0], retain_graph=True)
    assert held() == 3
    (again,) = torch.autograd.grad(o.sum(), args[0])
    assert held() == 0
    assert torch.equal(dq, again)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 700])
def test_small_kernels_give_pytorchs_bits(dtype: torch.dtype, tokens: int) -> None:
    """A gate that lies in another order."""
    gate = torch.randn(2, tokens, 3, dtype=dtype).transpose(0, 1)
    deltas = torch.randn(tokens, 2, 3)
    columns, dgate = gated_attention.branch_columns(gate, deltas)
    assert torch.equal(columns, torch.stack((*gate.float().unbind(-1), *deltas.unbind(-1))))
    assert torch.equal(dgate, deltas.to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 16), (90, 24)])
def test_gradients_are_finished_with_the_bits_of_single_steps(
    dtype: torch.dtype, tokens: int, head_dim: int
) -> None:
    """Rotated back as a rotation by the opposite angle, rounded, then added and rounded again."""
    dq, dck = (torch.randn(tokens, heads, head_dim, dtype=dtype) for heads in (6, 2))
    dk, of_k = torch.randn(2, tokens, 2, head_dim, dtype=dtype)
    dv, of_v = torch.randn(2, tokens, 2, 40, dtype=dtype)
    angles = torch.rand(100, head_dim // 2)
    cos, sin, positions = angles.cos(), angles.sin(), torch.randint(100, (tokens,)).int()
    back = [reference.rope(x, cos, -sin, positions) for x in (dq, dk, dck)]
    expected = (back[0], back[1] + of_k, dv + of_v)
    finish_gradients(dq, dk, of_k, dv, of_v, cos, sin, positions)
    turn_back(dck, cos, sin, positions)
    for x, wanted in zip((dq, dk, dv, dck), (*expected, back[2]), strict=True):
        assert torch.equal(x, wanted)


TURNS = {"HALF": 40, "BLOCK_HALF": 64, "ROWS": 16}
FIXED_KERNELS: dict[str, tuple[str, dict[str, int]]] = {
    "columns_kernel": ("gate dgate", {"TILE": 512}),
    "turn_kernel": ("q k ck q_turned k_turned ck_turned", TURNS),
    "turn_back_kernel": ("x", TURNS),
    "finish_kernel": ("dq dk of_k dv of_v", TURNS | {"TILE": 2048}),
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize(("backend", "arch"), [("cuda", 80), ("cuda", 100), ("hip", "gfx942")])
@pytest.mark.parametrize("name", FIXED_KERNELS)
def test_small_kernels_compile(name: str, backend: str, arch: Any) -> None:
    tensors, constants = FIXED_KERNELS[name]
    types = dict.fromkeys(tensors.split(), "*bf16")
    types |= dict.fromkeys(("cos", "sin", "deltas", "columns"), "*fp32")
    types |= dict.fromkeys(("positions", "window_positions"), "*i32")
    assert compile_fixed(name, types, constants, backend, arch).asm


@pytest.mark.gpu
def test_memory_of_65536_tokens() -> None:
    """Apart from inputs, output and gradients: at most the outputs of two branches."""
    x = Inputs.random(Shape(), 65536, requires_grad=True)
    assert peak_memory(x) <= 2.0
