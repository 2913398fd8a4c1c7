"""Kernels run where their tensors are, whatever the current device is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.ops._launch import run_kernel

from .inputs import Packed


class OnGPU(Tensor):
    """A tensor that says it is on the third GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 2)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("current", [0, 2])
def test_a_launch_makes_its_device_the_current_one(
    current: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[torch.device] = []

    def device(index: torch.device) -> AbstractContextManager[None]:
        entered.append(index)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    x = torch.zeros(1).as_subclass(OnGPU)
    launched: list[int] = []
    run_kernel(launched.append, x, (7,))
    assert launched == [7]
    assert entered == ([] if current == 2 else [torch.device("cuda", 2)])


def results(device: str) -> list[Tensor]:
    """The whole block and the gradients of what it reads, on the CPU."""
    args, keywords = Packed(torch.float16, requires_grad=True).block("weightedpool")
    names = [name for name, value in keywords.items() if isinstance(value, Tensor)]
    moved = [arg.detach().to(device).requires_grad_() for arg in args]
    for name in names:
        value = keywords[name]
        keywords[name] = value.detach().to(device).requires_grad_(value.requires_grad)
    o = ops.native_sparse_attention(*moved, **keywords)
    wrt = [*moved, *(keywords[name] for name in names if keywords[name].requires_grad)]
    assert {tensor.device for tensor in (o, *wrt)} == {torch.device(device)}
    return [tensor.cpu() for tensor in (o, *torch.autograd.grad(o.float().sum(), wrt))]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    for ours, theirs in zip(results("cuda:1"), results("cuda:0"), strict=True):
        assert torch.equal(ours, theirs)
