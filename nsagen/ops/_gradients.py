"""Gradients through the reference: the backward pass of ops that run on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def reference_gradients(
    forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Compute `forward` again, recorded, and differentiate it.

    Args:
        forward: from the inputs to the one output that has a gradient.
        grad: of that output.

    Returns:
        the inputs' gradients, contiguous and sharing no memory with anything.
    """
    with _recording():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = forward(*leaves)
        if not output.requires_grad:  # nothing of the inputs was used: no window, no token
            return tuple(torch.zeros_like(leaf).contiguous() for leaf in inputs)
        found = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    return tuple(
        torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        if gradient is None
        else gradient.clone(memory_format=torch.contiguous_format)
        for gradient, leaf in zip(found, inputs, strict=True)
    )


@contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record inside a custom op, where dispatch excludes it by default."""
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradCPU, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield
