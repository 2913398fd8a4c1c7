"""Logits in float32, without a second tensor of them in the weights' dtype.

A vocabulary is large: converting 16-bit logits of 10144 tokens over 128288 entries took about 4 ms
on an H200, and rounding makes different logits equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsagen.model.fused import is_bare

_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8 and newer


def logits_of(x: Tensor, head: nn.Linear) -> Tensor:
    """head(x) in float32.

    Args:
        x: [N, hidden_size].
        head: the language model head, without bias.

    Returns:
        float32 [N, vocab_size]; differentiable in x and the head's weight.
    """
    if _rounds_needlessly(x, head):
        return _Logits.apply(x, head.weight)
    return head(x).float()


def _rounds_needlessly(x: Tensor, head: nn.Linear) -> bool:
    """Whether one product can write float32: not if another part of the program changed the
    layer, by a hook, a subclass or a weight of another kind."""
    if torch.compiler.is_compiling():  # which fuses the conversion itself
        return False
    if not (_HAS_OUT_DTYPE and isinstance(head, nn.Linear) and is_bare(head)):
        return False
    weight = head.weight
    return x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


class _Logits(torch.autograd.Function):
    """x [N, D] @ weight [V, D].T in float32; gradients in x's dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype)
        dx = gradient @ weight if ctx.needs_input_grad[0] else None
        return dx, gradient.t() @ x if ctx.needs_input_grad[1] else None
