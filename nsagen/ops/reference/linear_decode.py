"""A linear layer with what stands around it in a model, for the few rows of a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.ops.reference._attend import wide_dtype


@torch.no_grad()
def linear_decode(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
    sigmoid_from: int | None = None,
) -> Tensor:
    """act(norm(x) @ weight.T) + residual, in float32 or wider and rounded once.

    Args:
        x: [R, K].
        weight: [N, K].
        norm_weight: [K]: norm(x) = x / sqrt(mean(x^2) + eps) * norm_weight; None: norm(x) = x.
        eps: of the norm.
        residual: [R, N], or [R, N / 2] with swiglu; None for 0.
        swiglu: the first N / 2 outputs are gates: act(y) = silu(gates) * others.
        sigmoid_from: outputs from this one on go through a sigmoid; None for none.

    Returns:
        [R, N], or [R, N / 2] with swiglu, in x's dtype.
    """
    dtype = wide_dtype(x, weight, norm_weight, residual)
    wide = x.to(dtype)
    if norm_weight is not None:
        wide = functional.rms_norm(wide, wide.shape[-1:], norm_weight.to(dtype), eps)
    y = functional.linear(wide, weight.to(dtype))
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = functional.silu(gate) * up
    if sigmoid_from is not None:
        y[:, sigmoid_from:].sigmoid_()
    return (y if residual is None else y + residual.to(dtype)).to(x.dtype)
