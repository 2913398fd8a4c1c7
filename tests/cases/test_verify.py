"""Inputs of `nsagen verify`: in every layout that a kernel takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, relative_error
from nsagen.cases.verify import launch_strided


def scaled(x: Tensor, w: Tensor, y: Tensor, scale: float) -> None:
    """y = scale x w, as a kernel that takes x in any strides and w contiguous."""
    if not w.is_contiguous():
        raise ValueError(f"scaled: w must be contiguous; got strides {w.stride()}")
    y.copy_(scale * x * w)


def careless(x: Tensor, w: Tensor, y: Tensor, scale: float) -> None:
    """The same, but with x where its rows would lie if it were contiguous."""
    scaled(x.as_strided(y.shape, y.stride()), w, y, scale)


def run(launch: Callable[..., None]) -> tuple[list[str], float]:
    """Which tensors a kernel took in strides, and its error."""
    x, w = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    y = torch.full_like(x, float("nan"))
    case = Case((x, w, y, 2.0), {"y": y}, lambda: {"y": 2.0 * x * w}, Cost(0.0, 0.0))
    views = launch_strided(launch, case)
    return views, relative_error(y, case.expected()["y"])


def test_strides_that_a_kernel_takes_and_those_that_it_refuses_by_name() -> None:
    assert run(scaled) == (["x"], 0.0)


def test_strides_that_a_kernel_overlooks() -> None:
    assert run(careless) == (["x"], float("inf"))
