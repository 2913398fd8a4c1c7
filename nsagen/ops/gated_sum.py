"""Gated sum: o = gate[..., 0] o_compressed + gate[..., 1] o_selected + gate[..., 2] o_sliding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.ops import reference
from nsagen.ops._checks import check_tensors
from nsagen.ops._derive import Gradients, backward_of, op_of
from nsagen.ops._launch import key_of
from nsagen.runtime import Dispatcher


def gated_sum(
    o_compressed: Tensor,
    o_selected: Tensor,
    o_sliding: Tensor,
    gate: Tensor,
    *,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """The three branches, each weighted by its gate.

    Args:
        o_compressed, o_selected, o_sliding: [N, HQ, Dv].
        gate: [N, HQ, 3] after the sigmoid, in the branches' dtype or float32.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [N, HQ, Dv] in the branches' dtype. Differentiable in all four.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    return gated_sum_forward(o_compressed, o_selected, o_sliding, gate, key_of(dispatcher))


def gate_of(gate: Tensor, on: Sequence[str]) -> Tensor:
    """A gate [N, HQ, 3] with zeros in the columns of the branches that are off.

    Whatever these held has no part in the sum, and gets no gradient.
    """
    columns = zip(BRANCHES, gate.unbind(-1), strict=True)
    return torch.stack([c if name in on else torch.zeros_like(c) for name, c in columns], -1)


gated_sum_forward = op_of(
    "gated_sum_forward",
    reference.gated_sum,
    returns="o",
    allocate=lambda o_compressed: o_compressed.new_empty(o_compressed.shape),
    check=check_tensors,
    kernel="gated_sum forward",
    launch="o_compressed o_selected o_sliding gate o",
    gradients=Gradients(
        "o_compressed o_selected o_sliding gate",
        "do o_compressed o_selected o_sliding gate do_compressed do_selected do_sliding dgate",
    ),
)

gated_sum_backward = backward_of(gated_sum_forward)
