"""Kernels run on their tensors' device, whichever is current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from nsagen.ops import _op
from nsagen.ops._op import _KernelCall, _LaunchArguments
from nsagen.runtime import replay

THIRD = torch.device("cuda", 2)


@pytest.mark.parametrize("current", [0, 2])
def test_a_launch_makes_its_device_the_current_one(
    current: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, entered, launched = [current], list[torch.device](), list[int]()

    def device(index: torch.device) -> AbstractContextManager[None]:
        entered.append(index)
        now[0] = 2
        return nullcontext()

    def empty(*meta: object) -> Tensor:
        assert now[0] == 2  # outputs, too, are made there
        return torch.zeros(1)

    monkeypatch.setattr(_op, "_current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(_op, "allocator", lambda device: empty)
    call = _KernelCall(
        launch=lambda x, number, y: launched.append(number),
        outputs=(replay.meta_of(torch.zeros(1)),),
        launched=_LaunchArguments(("x", "number", "y"), ("x", "number", "y"), {}),
        device=THIRD,
        returns=1,
    )
    call.compute((torch.zeros(1), 7))
    assert launched == [7]
    assert entered == ([] if current == 2 else [THIRD])
