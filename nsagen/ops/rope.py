"""Rotary position embedding, rotate-half convention."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_range, check_tensors
from nsagen.ops._derive import Gradients, op_of
from nsagen.ops._launch import key_of
from nsagen.ops._op import apply
from nsagen.runtime import Dispatcher


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Rotate each head by the angles of its token's position.

    With a = x[..., :D//2] and b = x[..., D//2:]: y = (a cos - b sin, b cos + a sin).

    Args:
        x: [N, H, D].
        cos, sin: float32 [P, D // 2], of each position's angles; not differentiable.
        positions: int32 [N], each in 0 .. P - 1.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        y [N, H, D] in x's dtype. Differentiable in x.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    return rope_forward(x, cos, sin, positions, key_of(dispatcher))


def check_positions(op: str, cos: Tensor, positions: Tensor) -> None:
    """If values are read: the tables have each position."""
    check_range(op, "positions", positions, 0, cos.shape[0])


def _gradients(dy: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, dispatcher: str) -> Tensor:
    # The transpose of a rotation is the rotation back.
    return rope_forward(dy.contiguous(), cos, apply(torch.neg, sin), positions, dispatcher)


rope_forward = op_of(
    "rope_forward",
    reference.rope,
    returns="y",
    allocate=lambda x: x.new_empty(x.shape),
    check=(check_tensors, check_positions),
    kernel="rope forward",
    launch="x cos sin positions y",
    gradients=Gradients("x", body=_gradients, takes="dy", omit="x", like={"x": "dy"}),
)
