"""Decode calls on a GPU: repeated calls match the first ones bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.ops import _op

from .inputs import STATICS, Cached

pytestmark = pytest.mark.gpu

WINDOWS = {"kernel_size": 8, "kernel_stride": 4}


def cached(seed: int) -> Cached:
    """Inputs of one shape and new content, on the GPU."""
    x = Cached(torch.float16)
    generator = torch.Generator().manual_seed(seed)
    for name, value in vars(x).items():
        if isinstance(value, Tensor):
            if value.is_floating_point() and name not in ("cos", "sin"):
                value = torch.randn(value.shape, generator=generator).to(value.dtype)
            setattr(x, name, value.cuda())
    x.rows = tuple(row.cuda() for row in x.rows)
    return x


def step(x: Cached) -> list[Tensor]:
    """All results and caches of a decoding step of attention, and a matrix product."""
    caches = x.caches()
    q = ops.cache_append(*x.append_inputs(), *caches, compress_type="linear", **WINDOWS)
    o, topk_idx = ops.compressed_attention_decode(q, *caches[2:4], *x.rows, **STATICS)
    args = (q, *caches[:2], topk_idx, *x.rows, o, x.gate)
    o = ops.native_sparse_attention_decode(*args, block_size=8, window_size=9)
    y = ops.linear_decode(o.flatten(1), x.w_v.view(-1, o[0].numel()), swiglu=True)
    return [*caches, q, topk_idx, o, y]


def by_jit(run: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """The results with every launch through Triton's JIT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_op._Known, "run", lambda self, args: self.compute(args))
        return [tensor.clone() for tensor in run()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_repeated_calls_give_the_same(mode: type) -> None:
    with mode():
        step(cached(0))
        for seed in (1, 2, 3):
            x = cached(seed)
            expected = by_jit(lambda x=x: step(x))
            for _ in range(2):
                assert all(map(torch.equal, step(x), expected))


@torch.no_grad()
def test_repeated_calls_take_the_current_stream() -> None:
    """On another stream, behind slow work that writes what the calls read."""
    x, y = cached(1), cached(2)
    expected = by_jit(lambda: step(y))
    step(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-4
        names = [name for name, value in vars(x).items() if isinstance(value, Tensor)]
        for name in names:
            getattr(x, name).copy_(getattr(y, name))
        found = step(x)
    side.synchronize()
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_addresses_of_another_alignment() -> None:
    x = cached(1)
    step(x)
    expected = by_jit(lambda: step(x))
    odd = torch.empty(x.q.numel() + 1, dtype=x.q.dtype, device="cuda")[1:].view(x.q.shape)
    x.q = odd.copy_(x.q)
    for _ in range(2):
        assert all(map(torch.equal, step(x), expected))


@torch.no_grad()
def test_a_graph_replays_repeated_calls() -> None:
    x, y = cached(1), cached(2)
    expected = by_jit(lambda: step(y))
    step(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x)
    for name, value in vars(x).items():
        if isinstance(value, Tensor):
            value.copy_(getattr(y, name))
    graph.replay()
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_torch_compile_sees_known_calls_as_ops() -> None:
    x = cached(1)
    expected = step(x)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert all(map(torch.equal, found, expected))
