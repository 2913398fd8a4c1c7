"""Kernels run where their tensors are, whatever the current device is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from nsagen.ops._launch import run_kernel


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
