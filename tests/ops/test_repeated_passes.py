"""Both passes of the whole attention are repeated as programs, on a GPU that only takes notes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter repeats no launches"
)

triton = pytest.importorskip("triton")

from triton.runtime import driver  # noqa: E402

import nsagen  # noqa: E402
from nsagen import ops  # noqa: E402
from nsagen.ops import _fixed_kernels, _op  # noqa: E402
from nsagen.ops._calls import forget  # noqa: E402
from nsagen.runtime import Dispatcher, dispatcher  # noqa: E402

BLOCK = {"compress_type": "avgpool", "kernel_size": 32, "kernel_stride": 16, "block_size": 64}


class Launches:
    """Names of launched kernels: those that Triton's JIT examined, and repeated ones."""

    def __init__(self) -> None:
        self.by_jit: list[str] = []
        self.repeated: list[str] = []

    def jit(self, kernel: Any, *args: Any, **named: Any) -> Any:
        name = kernel.__name__
        self.by_jit.append(name)
        run = lambda *args: self.repeated.append(name)  # noqa: E731
        return SimpleNamespace(run=run, function=object(), packed_metadata=())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """An H200 in place of the CPU: kernels do nothing, so results hold anything."""
    seen = Launches()
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **named: seen.jit(*args, **named))
    modules = [m for name, m in sys.modules.items() if name.startswith("nsagen.ops.")]
    for name, answer in (("on_kernels", True), ("values_are_read", False)):
        for module in modules:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda x, answer=answer: answer)
    monkeypatch.setattr(_op, "replays", lambda x: True)
    monkeypatch.setattr(_fixed_kernels, "runs_on", lambda x: True)
    monkeypatch.setattr(dispatcher, "target_of", lambda device: "cuda:90")
    monkeypatch.setattr(Dispatcher, "_target", lambda self, workload, device: "cuda:90")
    previous = driver._active
    driver.set_active(SimpleNamespace(get_current_stream=lambda device: 0))  # type: ignore[arg-type]
    yield seen
    driver.set_active(previous)  # type: ignore[arg-type]
    forget()


@pytest.mark.parametrize("prepared", [False, True], ids=["lengths made", "lengths prepared"])
def test_a_known_call_launches_without_the_jit(launches: Launches, prepared: bool) -> None:
    tokens = 96
    q = torch.zeros(tokens, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    k, v = torch.zeros(2, tokens, 4, 128, dtype=torch.bfloat16).requires_grad_()
    gate = torch.zeros(tokens, 64, 3, dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 40, tokens], dtype=torch.int32)
    cos, sin = torch.zeros(2, tokens, 64)
    own = nsagen.load("llama8b")

    def both_passes() -> None:
        lengths = ops.Lengths.of(cu_seqlens, tokens, 32, 16) if prepared else None
        o = ops.native_sparse_attention(
            *(q, k, v, gate),
            **{**BLOCK, "topk": 16, "window_size": 512},
            **{"cu_seqlens": cu_seqlens, "cos": cos, "sin": sin},
            lengths=lengths,
            dispatcher=own,
        )
        found = torch.autograd.grad(o, (q, k, v, gate), torch.zeros_like(o))
        assert [x.shape for x in found] == [x.shape for x in (q, k, v, gate)]

    both_passes()
    both_passes()  # is recorded
    launches.by_jit.clear()
    launches.repeated.clear()
    both_passes()
    assert launches.by_jit == []
    assert len(launches.repeated) == 32  # and two in PyTorch's running sum
