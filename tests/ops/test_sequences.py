"""The whole attention on a stand-in for a GPU: its launches, and that repeated ones agree."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsagen import ops
from nsagen.ops import _op
from nsagen.ops._calls import KnownCalls
from nsagen.ops.compressed_attention import compressed_attention_forward
from tests.stand_in import Launch, StandIn, dispatcher, same_up_to_addresses
from tests.stand_in import gpu as gpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"
)

SIZES: dict[str, Any] = {
    **{"compress_type": "avgpool", "kernel_size": 32, "kernel_stride": 16},
    **{"block_size": 64, "topk": 16, "window_size": 512},
}


class Inputs:
    """One sequence for the shape that public implementations are measured on."""

    def __init__(self, tokens: int, requires_grad: bool = False) -> None:
        def empty(*shape: int) -> Tensor:
            x = torch.empty(shape, dtype=torch.bfloat16)
            return x.requires_grad_(requires_grad)

        self.args = [empty(tokens, heads, 128) for heads in (64, 4, 4)] + [empty(tokens, 64, 3)]
        self.cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
        tables = {name: torch.empty(tokens, 64) for name in ("cos", "sin")}
        self.keywords = {**SIZES, **tables, "cu_seqlens": self.cu_seqlens}
        self.keywords["dispatcher"] = dispatcher()
        self.gradient = torch.empty(tokens, 64, 128, dtype=torch.bfloat16)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return ops.native_sparse_attention(*self.args, **self.keywords)

    def training(self) -> tuple[Tensor, ...]:
        o = ops.native_sparse_attention(*self.args, **self.keywords)
        return o, *torch.autograd.grad(o, self.args, self.gradient)


def by_jit(gpu: StandIn, call: Callable[[], Any]) -> list[Launch]:
    """The launches of a call in which Triton's JIT launches each op's kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_op._Known, "run", lambda self, args: self.compute(args))
        return gpu.of(call)


# Each has its own number of tokens, since calls stay remembered.
@pytest.mark.parametrize(("what", "tokens"), [("forward", 300), ("training", 320)])
def test_a_repeated_call_launches_what_its_ops_do(gpu: StandIn, tokens: int, what: str) -> None:
    x = Inputs(tokens, requires_grad=what == "training")
    first = gpu.of(getattr(x, what))
    assert all(launch.by_jit for launch in first)
    gpu.of(getattr(x, what))  # is recorded
    for y in (x, Inputs(tokens, requires_grad=what == "training")):
        expected = by_jit(gpu, getattr(y, what))
        found = gpu.of(getattr(y, what))
        assert not any(launch.by_jit for launch in found)
        same_up_to_addresses(found, expected)


@pytest.mark.parametrize("tokens", [256, 2048, 8192])
def test_few_launches(gpu: StandIn, tokens: int) -> None:
    """One of them plans the unions of neighbours' blocks."""
    x, y = Inputs(tokens), Inputs(tokens, requires_grad=True)
    for _ in range(3):
        assert len(gpu.of(x.forward)) == 12
        assert len(gpu.of(lambda: ops.native_sparse_attention(*y.args, **y.keywords))) == 11


@pytest.mark.parametrize("what", ["forward", "training"])
def test_forced_blocks_are_met_once(gpu: StandIn, what: str) -> None:
    """The window's kernel gives their result, and selected attention starts from it."""
    x = Inputs(368, requires_grad=what == "training")
    kernels = [launch.kernel for launch in gpu.of(getattr(x, what))]
    of_op = {
        op: [name for name in kernels if name.startswith(f"{op}_forward")]
        for op in ("sliding_window_attention", "selected_attention")
    }
    for names in of_op.values():
        assert names
        assert all("_i1_c2__" in name for name in names)


def test_few_launches_of_both_passes(gpu: StandIn) -> None:
    """How many depends on the schedules. PyTorch adds a running sum."""
    x = Inputs(2048, requires_grad=True)
    for _ in range(3):
        assert len(gpu.of(x.training)) <= 32


def test_a_repeated_call_of_both_passes_is_looked_up_thrice(
    gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lengths, the attention, and its backward pass as a whole."""
    looked_up = list[int]()
    find = KnownCalls.find
    monkeypatch.setattr(
        KnownCalls, "find", lambda self, args: looked_up.append(len(args)) or find(self, args)
    )
    x = Inputs(384, requires_grad=True)
    for _ in range(3):
        looked_up.clear()
        gpu.of(x.training)
    assert len(looked_up) == 3


def test_a_profiler_sees_the_ops_of_a_repeated_call(gpu: StandIn) -> None:
    x = Inputs(352, requires_grad=True)
    for _ in range(3):
        gpu.of(x.training)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        gpu.of(x.training)
    names = {event.key for event in profiler.key_averages()}
    parts = {"free_blocks_attention", "selected_attention_backward", "turn"}
    assert {f"nsagen::{name}" for name in parts} <= names


def test_prepared_lengths_save_one(gpu: StandIn) -> None:
    x = Inputs(2048)
    x.keywords["lengths"] = ops.Lengths.of(x.cu_seqlens, 2048, 32, 16)
    for _ in range(3):
        assert len(gpu.of(x.forward)) == 11


def test_a_call_that_launches_nothing_of_triton_is_repeated(gpu: StandIn) -> None:
    """Without windows, compressed attention only fills its outputs."""
    x = Inputs(10)
    q = x.args[0]
    empty = torch.empty(0, 4, 128, dtype=torch.bfloat16)
    ends = (x.cu_seqlens, torch.zeros(2, dtype=torch.int32))
    for _ in range(4):
        args = (q, empty, empty.clone(), *ends, 32, 16, 0.1, x.keywords["dispatcher"].key)
        assert not gpu.of(lambda args=args: compressed_attention_forward(*args))
        o, lse = gpu.kept[-1]
        assert not o.any()
        assert bool((lse == float("-inf")).all())


def test_tensors_of_a_repeated_call_are_free_as_soon_as_those_of_the_first(gpu: StandIn) -> None:
    """Remembered calls hold no tensor."""
    x = Inputs(336, requires_grad=True)
    gc.disable()
    try:
        for _ in range(4):
            held = [weakref.ref(tensor) for tensor in x.training()]
            gpu.kept.clear()
            assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()
