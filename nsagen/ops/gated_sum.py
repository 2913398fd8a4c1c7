"""Gated sum: o = gate[..., 0] o_compressed + gate[..., 1] o_selected + gate[..., 2] o_sliding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.ops import reference
from nsagen.ops._checks import check_like, check_rows, fail
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


def check_gate(op: str, gate: Tensor, o_compressed: Tensor) -> None:
    """gate [N, HQ, 3] in the dtype of o [N, HQ, Dv] or float32, last dimension contiguous."""
    o, wanted = o_compressed, (*o_compressed.shape[:2], 3)
    check_rows(op, gate=gate)
    if gate.shape != wanted:
        remedy = "pass compressed, selected, sliding for each head"
        fail(op, f"gate must be {wanted}", tuple(gate.shape), remedy)
    if gate.dtype not in (o.dtype, torch.float32) or gate.device != o.device:
        rule = f"gate must be {o.dtype} or float32 on {o.device}"
        fail(op, rule, f"{gate.dtype} on {gate.device}", "convert it")


def _check(op: str, o_compressed: Tensor, o_selected: Tensor, o_sliding: Tensor) -> None:
    check_rows(op, o_compressed=o_compressed, o_selected=o_selected, o_sliding=o_sliding)
    like = ("o_compressed", o_compressed)
    check_like(op, like, o_selected=o_selected, o_sliding=o_sliding)


gated_sum_forward = op_of(
    "gated_sum_forward",
    reference.gated_sum,
    returns="o",
    allocate=lambda o_compressed: o_compressed.new_empty(o_compressed.shape),
    check=(_check, check_gate),
    kernel="gated_sum forward",
    launch="o_compressed o_selected o_sliding gate o",
    gradients=Gradients(
        "o_compressed o_selected o_sliding gate",
        "do o_compressed o_selected o_sliding gate do_compressed do_selected do_sliding dgate",
    ),
)

gated_sum_backward = backward_of(gated_sum_forward)
