"""Example calls of compression's backward kernels."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.cases.compress import make_case as make_forward_case
from nsagen.cases.compress import window_results
from nsagen.core.workload import Workload


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """The forward pass's inputs and a random dy, NaN past the last window; gradients poisoned."""
    forward = make_forward_case(workload, sizes, device, seed)
    x, w, pe, cu_seqlens, y_cu_seqlens, y = forward.args
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    assert isinstance(cu_seqlens, torch.Tensor)
    dy = torch.full_like(y, float("nan"))
    windows = sum(
        max(0, (length - int(workload.kernel_size)) // int(workload.kernel_stride) + 1)
        for length in sizes.seqlens
    )
    if dy.device.type != "meta":
        random = torch.Generator(device).manual_seed(seed + 1)
        dy[:windows].normal_(generator=random)
    given = {
        name: tensor
        for name, tensor in (("x", x), ("w", w), ("pe", pe))
        if isinstance(tensor, torch.Tensor)
    }
    outputs = {
        f"d{name}": poisoned(tuple(tensor.shape), tensor.dtype, device)
        for name, tensor in given.items()
    }

    def expected() -> dict[str, torch.Tensor]:
        leaves = {name: t.double().requires_grad_() for name, t in given.items()}
        tensors = (leaves["x"], leaves.get("w"), leaves.get("pe"))
        y = window_results(workload, *tensors, cu_seqlens)
        if windows == 0:
            return {f"d{name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(y[:windows], list(leaves.values()), dy[:windows].double())
        return dict(zip(outputs, found, strict=True))

    gradients = (outputs["dx"], outputs.get("dw"), outputs.get("dpe"))
    tensors = [dy, *given.values(), *outputs.values()]
    return Case(
        args=(dy, x, w, pe, cu_seqlens, y_cu_seqlens, *gradients),
        outputs=outputs,
        expected=expected,
        cost=Cost(flops=2 * forward.cost.flops, bytes=sum(t.nbytes for t in tensors)),
    )
