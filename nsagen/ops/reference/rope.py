"""Rotary position embedding, rotate-half convention."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._attend import upcast


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate each head by the angles of its token's position.

    With a = x[..., :D//2] and b = x[..., D//2:]: y = (a cos - b sin, b cos + a sin).

    Args:
        x: [N, H, D].
        cos: float32 [P, D // 2], cosine of each position's angles.
        sin: float32 [P, D // 2].
        positions: int32 [N], each in 0 .. P - 1.

    Returns:
        [N, H, D] in x's dtype.
    """
    rows = positions.long()
    wide, cos, sin = upcast(x, cos[rows].unsqueeze(1), sin[rows].unsqueeze(1))
    a, b = wide.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope_if_given(x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor) -> Tensor:
    """`rope`, or x as it is where there are no tables."""
    if cos is None and sin is None:
        return x
    if cos is None or sin is None:
        missing = "cos" if cos is None else "sin"
        raise InvalidInputError(
            f"rope: cos and sin come together; got no {missing}; pass both tables, or neither for "
            f"no rope"
        )
    return rope(x, cos, sin, positions)
