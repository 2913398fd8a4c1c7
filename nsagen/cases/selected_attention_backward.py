"""Example calls of selected attention's backward kernels."""

from __future__ import annotations

import dataclasses

import torch

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.selected_attention import make_inputs
from nsagen.core.workload import Workload


def make_case(
    workload: Workload,
    sizes: Sizes,
    device: torch.device | str,
    seed: int = 0,
    topk_idx: torch.Tensor | None = None,
) -> Case:
    """The forward pass's inputs and outputs, and a random gradient of its output.

    Args:
        topk_idx: the blocks, instead of random ones.
    """
    x = make_inputs(workload, sizes, device, seed)
    if topk_idx is not None:
        x = dataclasses.replace(x, topk_idx=topk_idx.to(device, torch.int32))
    o, lse = x.outputs()
    if o.device.type == "meta":
        do = torch.empty_like(o)
    else:
        for out, found in zip((o, lse), x.attend(x.q, x.k, x.v), strict=True):
            out.copy_(found)
        random = torch.Generator(device).manual_seed(seed + 1)
        do = torch.randn(o.shape, dtype=o.dtype, device=device, generator=random)
    differentiable = {"dq": x.q, "dk": x.k, "dv": x.v}
    outputs = {
        name: poisoned(tuple(y.shape), y.dtype, device) for name, y in differentiable.items()
    }

    def expected() -> dict[str, torch.Tensor]:
        leaves = [y.double().requires_grad_() for y in differentiable.values()]
        found = torch.autograd.grad(x.attend(*leaves)[0], leaves, do.double())
        return dict(zip(outputs, found, strict=True))

    more = (None, None, *x.chunk.named.values()) if x.chunk.named else ()
    inputs = (do, x.q, x.k, x.v, x.topk_idx, x.cu_seqlens, o, lse)
    tensors = (*inputs, *outputs.values())
    return Case(
        args=(*inputs, *outputs.values(), x.softmax_scale, *more),
        outputs=outputs,
        expected=expected,
        cost=Cost(  # s = q k, dq = ds k and dk = ds q; dp = do v and dv = p do
            flops=2 * x.pairs * x.q.shape[1] * (3 * x.q.shape[2] + 2 * x.v.shape[2]),
            bytes=sum(tensor.nbytes for tensor in tensors),
        ),
    )
