"""Example calls of a linear layer's decode kernel."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """A gated layer, as in a model whose width is 128 * kv_heads."""
    width = 128 * sizes.kv_heads
    shape = (len(sizes.seqlens), width, 4 * width)
    return linear_case(workload, *shape, device, seed, swiglu=True)


def linear_case(
    workload: Workload,
    rows: int,
    in_features: int,
    out_features: int,
    device: torch.device | str,
    seed: int = 0,
    *,
    residual: bool = False,
    swiglu: bool = False,
    sigmoid_from: int | None = None,
) -> Case:
    """Random x [rows, in_features] and weights; y poisoned."""
    dtype = getattr(torch, workload.dtype)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device, generator=random) * scale).to(dtype)

    outputs = out_features // 2 if swiglu else out_features
    x, weight = (
        normal(rows, in_features),
        normal(out_features, in_features, scale=in_features**-0.5),
    )
    added = normal(rows, outputs) if residual else None
    y = poisoned((rows, outputs), dtype, device)

    def expected() -> dict[str, torch.Tensor]:
        result = reference.linear_decode(
            x.double(),
            weight.double(),
            residual=None if added is None else added.double(),
            swiglu=swiglu,
            sigmoid_from=sigmoid_from,
        )
        return {"y": result}

    return Case(
        args=(x, weight, added, y, swiglu, sigmoid_from),
        outputs={"y": y},
        expected=expected,
        cost=Cost(
            flops=2.0 * rows * in_features * out_features,
            bytes=x.nbytes + weight.nbytes + y.nbytes + (0 if added is None else added.nbytes),
        ),
    )
