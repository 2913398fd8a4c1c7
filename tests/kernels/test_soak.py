"""Many calls of mixed sizes through one dispatcher: memory stays where it is."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch

from nsagen import ops
from nsagen.runtime import Dispatcher
from tests.support import kernel_device

MIB = 1 << 20


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory) -> Dispatcher:
    return Dispatcher("soak", "", {})


@pytest.fixture(autouse=True)
def _cache_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "soak"))


def packed(draw: random.Random, dispatcher: Dispatcher) -> None:
    """Rope, a window and the gates over a ragged batch."""
    device, group = kernel_device(), draw.choice((1, 2, 3))
    lengths = [draw.choice((0, 1, 3, 17)) for _ in range(draw.randint(0, 3))]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = int(ends[-1])
    q, k, v = (torch.randn(tokens, h, 16, device=device) for h in (2 * group, 2, 2))
    tables = torch.randn(2, 32, 8, device=device).unbind()
    positions = torch.zeros(tokens, dtype=torch.int32, device=device)
    q = ops.rope(q, *tables, positions, dispatcher=dispatcher)
    o = ops.sliding_window_attention(q, k, v, 8, ends.to(device), dispatcher=dispatcher)
    ops.gated_sum(o, o, o, torch.rand(*o.shape[:2], 3, device=device), dispatcher=dispatcher)


def decoding(draw: random.Random, dispatcher: Dispatcher) -> None:
    """Some rows of a cache, of which some are idle."""
    device, rows = kernel_device(), draw.randint(1, 4)
    q = torch.randn(rows, 4, 16, device=device)
    caches = torch.randn(2, 4, draw.choice((8, 16)), 2, 16, device=device).unbind()
    ints = {"dtype": torch.int32, "device": device}
    positions = torch.tensor([draw.randint(-1, 7) for _ in range(rows)], **ints)
    slots = torch.arange(rows, **ints)
    topk_idx = torch.randint(-1, 2, (2, rows, 2), **ints)
    gate = torch.rand(rows, 4, 3, device=device)
    inputs = (q, *caches, topk_idx, positions, slots, torch.randn_like(q), gate)
    ops.native_sparse_attention_decode(*inputs, block_size=8, window_size=4, dispatcher=dispatcher)


def used() -> int:
    """Bytes of this process, and on the GPU of its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("calls", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_and_dispatch_stay_where_they_are(calls: int, dispatcher: Dispatcher) -> None:
    draw = random.Random(calls)
    steps = (packed, decoding)
    for step in steps * 20:
        step(draw, dispatcher)
    before, kernels = used(), len(dispatcher._choices)
    for _ in range(calls):
        draw.choice(steps)(draw, dispatcher)
    assert used() - before < (MIB if torch.cuda.is_available() else 24 * MIB)
    assert len(dispatcher._choices) == kernels
