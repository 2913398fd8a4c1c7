"""What the cases of attention's backward kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsagen.cases.base import Case, Cost, poisoned
from nsagen.ops._gradients import reference_gradients

Forward = Callable[..., tuple[torch.Tensor, ...]]
"""The reference: (q, k, v) -> (o, lse)."""


def gradient_case(
    forward_case: Case,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    offsets: tuple[torch.Tensor, ...],
    forward: Forward,
    seed: int,
) -> Case:
    """A case of `launch(do, q, k, v, *offsets, o, lse, dq, dk, dv, softmax_scale)`.

    Args:
        forward_case: of the forward pass; its last argument is the scale; outputs o and lse.
        inputs: its q, k and v.
        offsets: its cu_seqlens.
        forward: the reference with everything except (q, k, v) given.
        seed: of do.
    """
    o, lse = forward_case.outputs["o"], forward_case.outputs["lse"]
    do = torch.empty_like(o)
    if o.device.type != "meta":
        random = torch.Generator(o.device).manual_seed(seed + 1)
        do.normal_(generator=random)
        with torch.no_grad():
            expected_o, expected_lse = forward(*inputs)
        o.copy_(expected_o)
        lse.copy_(expected_lse)
    outputs = {
        name: poisoned(tuple(x.shape), x.dtype, x.device)
        for name, x in zip(("dq", "dk", "dv"), inputs, strict=True)
    }

    def expected() -> dict[str, torch.Tensor]:
        wide = tuple(x.double() for x in inputs)
        found = reference_gradients(lambda *x: forward(*x)[0], wide, do.double())
        return dict(zip(outputs, found, strict=True))

    moved = (do, o, lse, *inputs, *outputs.values())
    return Case(
        args=(do, *inputs, *offsets, o, lse, *outputs.values(), forward_case.args[-1]),
        outputs=outputs,
        expected=expected,
        # Five matrix products where the forward pass has two: s, dp, dv, dk and dq.
        cost=Cost(flops=2.5 * forward_case.cost.flops, bytes=sum(x.nbytes for x in moved)),
    )
