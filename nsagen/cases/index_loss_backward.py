"""Example calls of the index loss's backward kernels, over lists of blocks or over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.cases.base import Case, Sizes, poisoned
from nsagen.cases.index_loss import cost_of, make_inputs
from nsagen.core.workload import Workload


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """The forward pass's inputs and outputs, and a random gradient of the loss."""
    x = make_inputs(workload, sizes, device, seed)
    loss, *kept = x.outputs().values()
    dloss = torch.empty_like(loss)
    if loss.device.type != "meta":
        _, *found = x.loss(x.index_q.double(), x.index_k.double())
        for tensor, value in zip(kept, found, strict=True):
            tensor.copy_(value)
        random = torch.Generator(device).manual_seed(seed + 1)
        dloss = torch.randn(loss.shape, device=device, generator=random)
    leaves = {"dindex_q": x.index_q, "dindex_k": x.index_k}
    outputs = {n: poisoned(tuple(y.shape), y.dtype, device) for n, y in leaves.items()}

    def expected() -> dict[str, Tensor]:
        wide = [y.double().requires_grad_() for y in leaves.values()]
        found = torch.autograd.grad(x.loss(*wide)[0], wide, dloss.double())
        return dict(zip(outputs, found, strict=True))

    made = tuple(outputs.values())
    args = (*x.tensors, dloss, *kept, *made, *x.scales)
    return Case(args, outputs, expected, cost_of(x, (dloss, *kept, *made)))
