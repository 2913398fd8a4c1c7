"""Example calls of the gated sum's backward kernel."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.gated_sum import make_case as make_forward_case
from nsagen.core.workload import Workload
from nsagen.ops import reference

_NAMES = ("d_compressed", "d_selected", "d_sliding", "dgate")


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """The forward pass's inputs and a random do; gradients poisoned."""
    forward = make_forward_case(workload, sizes, device, seed)
    inputs = [x for x in forward.args[:4] if isinstance(x, torch.Tensor)]
    do = torch.empty_like(inputs[0])
    if do.device.type != "meta":
        do.normal_(generator=torch.Generator(device).manual_seed(seed + 1))
    outputs = {
        name: poisoned(tuple(x.shape), x.dtype, device)
        for name, x in zip(_NAMES, inputs, strict=True)
    }

    def expected() -> dict[str, torch.Tensor]:
        leaves = [x.double().requires_grad_() for x in inputs]
        found = torch.autograd.grad(reference.gated_sum(*leaves), leaves, do.double())
        return dict(zip(_NAMES, found, strict=True))

    tensors = (do, *inputs, *outputs.values())
    return Case(
        args=tensors,
        outputs=outputs,
        expected=expected,
        cost=Cost(flops=0, bytes=sum(x.nbytes for x in tensors)),
    )
