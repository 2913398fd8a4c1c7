"""Example calls of the gated sum's forward kernel."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random branches [N, HQ, Dv] and gates in 0 .. 1; o poisoned. HQ is sizes.kv_heads."""
    dtype = getattr(torch, workload.dtype)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)
    shape = (sizes.tokens, sizes.kv_heads, int(workload.v_head_dim))
    branches = tuple(
        torch.randn(shape, dtype=dtype, device=device, generator=random) for _ in range(3)
    )
    gate = torch.rand((*shape[:2], 3), dtype=dtype, device=device, generator=random)
    o = poisoned(shape, dtype, device)

    def expected() -> dict[str, torch.Tensor]:
        return {"o": reference.gated_sum(*(x.double() for x in (*branches, gate)))}

    tensors = (*branches, gate, o)
    return Case(
        args=tensors,
        outputs={"o": o},
        expected=expected,
        cost=Cost(flops=0, bytes=sum(x.nbytes for x in tensors)),
    )
