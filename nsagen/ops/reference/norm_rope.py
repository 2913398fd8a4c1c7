"""RMS norm of each head, then rope on its first elements: what makes index queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._attend import upcast
from nsagen.ops.reference.rope import rope


def norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    eps: float = 1e-6,
    unit_offset: bool = True,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight) a head, its first R elements roped.

    Args:
        x: [N, H, D], e.g. a projection to index queries or to the one index key head.
        weight: [D].
        cos: float32 [P, R // 2], cosine of each position's angles; R <= D elements are rotated.
        sin: float32 [P, R // 2].
        positions: int32 [N], each in 0 .. P - 1.
        eps: added to the mean square.
        unit_offset: whether the factor is 1 + weight; else it is weight.

    Returns:
        [N, H, D] in x's dtype; differentiable in x and weight.
    """
    rotated = 2 * cos.shape[-1]
    if weight.shape != x.shape[-1:] or rotated > x.shape[-1]:
        raise InvalidInputError(
            f"norm_rope: weight must be [D] and cos [P, R // 2] with R <= D; got x "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}, cos {tuple(cos.shape)}; "
            "pass one weight for all heads, and the tables of the rotated elements"
        )
    wide, factor = upcast(x, weight)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = y * (1 + factor if unit_offset else factor)
    turned, rest = y.split((rotated, x.shape[-1] - rotated), -1)
    return torch.cat((rope(turned, cos, sin, positions), rest), -1).to(x.dtype)
