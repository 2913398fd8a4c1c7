"""The gated sum in the last branch's kernel: the same numbers, where nothing is trained."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen import ops
from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.core.branches import BRANCHES
from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference
from nsagen.ops.sliding_window_gated_sum import sliding_window_gated_sum

from .inputs import Packed

FUSED, SEPARATE = "nsagen::sliding_window_gated_sum", "nsagen::gated_sum_forward"


class Ops(TorchDispatchMode):
    """Counts the ops of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def called(requires_grad: bool = False, **changes: Any) -> Counter[str]:
    args, keywords = Packed(requires_grad=requires_grad).block()
    with Ops() as seen:
        ops.native_sparse_attention(*args, **{**keywords, **changes})
    return seen.calls


def test_it_is_taken_where_nothing_is_trained() -> None:
    calls = called()
    assert (calls[FUSED], calls[SEPARATE]) == (1, 0)
    with torch.no_grad():
        calls = called(requires_grad=True)
    assert (calls[FUSED], calls[SEPARATE]) == (1, 0)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="kernels take the ops of gated attention, which test_gated_attention.py tests",
)
def test_gradients_take_the_separate_ops() -> None:
    calls = called(requires_grad=True)
    assert (calls[FUSED], calls[SEPARATE]) == (0, 1)


@pytest.mark.parametrize("name", ["q", "k", "v", "gate"])
def test_one_tensor_with_a_gradient_is_enough(name: str) -> None:
    args, keywords = Packed().block()
    leaf = args[("q", "k", "v", "gate").index(name)].requires_grad_()
    o = ops.native_sparse_attention(*args, **keywords)
    (found,) = torch.autograd.grad(o.sum(), leaf)
    o = reference.native_sparse_attention(*args, **keywords)
    (expected,) = torch.autograd.grad(o.sum(), leaf)
    assert relative_error(found, expected) <= THRESHOLDS[torch.float32]


@pytest.mark.parametrize("on", list(itertools.combinations(BRANCHES, 2)), ids="-".join)
def test_a_branch_that_is_off_takes_the_separate_ops(on: tuple[str, ...]) -> None:
    calls = called(branches=on)
    assert (calls[FUSED], calls[SEPARATE]) == (0, 1)
    calls = called(window_size=0)
    assert (calls[FUSED], calls[SEPARATE]) == (0, 1)


def test_it_stays_an_op_when_compiled() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    x = Packed()
    o = x.randn(*x.q.shape[:2], 24)
    args = (x.q, x.k, x.v, x.cu_seqlens, o, o.clone(), x.gate, 9, 0.25)
    compiled = torch.compile(sliding_window_gated_sum, backend=backend, fullgraph=True)
    assert torch.equal(compiled(*args), sliding_window_gated_sum(*args))
    (graph,) = graphs
    assert any("sliding_window_gated_sum" in str(node.target) for node in graph.graph.nodes)


def test_it_has_no_gradient() -> None:
    x = Packed()
    o = x.randn(*x.q.shape[:2], 24)
    args = (x.q.requires_grad_(), x.k, x.v, x.cu_seqlens, o, o.clone(), x.gate, 9, 0.25)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        sliding_window_gated_sum(*args).sum().backward()


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("wide_gate", [False, True], ids=["gate", "float32 gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_by_kernels(dtype: torch.dtype, wide_gate: bool) -> None:
    """Against the separate ops; some sequences are empty or see no window.

    Branches and gates that lie in memory in another order are copied first.
    """
    x = Packed(dtype)
    gate = x.gate.float() if wide_gate else x.gate
    gate = gate.transpose(0, 1).contiguous().transpose(0, 1)
    o_compressed, o_selected = (x.randn(*x.q.shape[:2], 24) for _ in range(2))
    o_compressed[:5] = 0.0
    o_selected = torch.cat([o_selected, o_selected], 1)[:, :6]
    tensors = (x.q, x.k, x.v, x.cu_seqlens, o_compressed, o_selected, gate)
    o = sliding_window_gated_sum(*tensors, 9, 0.25)
    o_sliding = ops.sliding_window_attention(x.q, x.k, x.v, 9, x.cu_seqlens, 0.25)
    separate = ops.gated_sum(o_compressed, o_selected, o_sliding, gate)
    assert o.dtype == separate.dtype
    assert relative_error(o, separate) <= THRESHOLDS[dtype]


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_wrong_branches_are_refused() -> None:
    x = Packed()
    o = x.randn(*x.q.shape[:2], 24)
    inputs = (x.q, x.k, x.v, x.cu_seqlens)
    with pytest.raises(InvalidInputError, match=r"o_selected must have shape .* HQ is q's"):
        sliding_window_gated_sum(*inputs, o, o[:, :3], x.gate, 9, 0.25)
    with pytest.raises(InvalidInputError, match="must share one float dtype"):
        sliding_window_gated_sum(*inputs, o.half(), o.half(), x.gate, 9, 0.25)
    with pytest.raises(InvalidInputError, match="gate must have shape"):
        sliding_window_gated_sum(*inputs, o, o, x.gate[..., :2], 9, 0.25)
    with pytest.raises(InvalidInputError, match="window_size must be positive"):
        sliding_window_gated_sum(*inputs, o, o, x.gate, 0, 0.25)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_nothing_to_do() -> None:
    x = Packed(seqlens=(0, 0))
    o = x.randn(0, 6, 24)
    inputs = (x.q, x.k, x.v, x.cu_seqlens, o, o, x.gate)
    assert sliding_window_gated_sum(*inputs, 9, 0.25).shape == (0, 6, 24)
