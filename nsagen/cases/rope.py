"""Example calls of rope's forward kernel."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random x [N, H, D], each token at its place in its sequence; y poisoned. H: kv_heads."""
    dtype, dim = getattr(torch, workload.dtype), int(workload.head_dim)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)
    shape = (sizes.tokens, sizes.kv_heads, dim)
    x = torch.randn(shape, dtype=dtype, device=device, generator=random)
    places = [place for length in sizes.seqlens for place in range(length)]
    positions = torch.tensor(places, dtype=torch.int32).to(device)
    cos, sin = random_tables(max(sizes.seqlens, default=0), dim, device, random)
    y = poisoned(shape, dtype, device)

    def expected() -> dict[str, torch.Tensor]:
        return {"y": reference.rope(x.double(), cos, sin, positions)}

    tables = 2 * 4 * (dim // 2) * min(cos.shape[0], sizes.tokens)
    return Case(
        args=(x, cos, sin, positions, y),
        outputs={"y": y},
        expected=expected,
        cost=Cost(flops=0, bytes=x.nbytes + positions.nbytes + y.nbytes + tables),
    )


def random_tables(
    length: int, dim: int, device: torch.device | str, random: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [length, dim // 2], of angles that no two positions share."""
    angles = 7 * torch.rand((length, dim // 2), device=device, generator=random)
    return angles.cos(), angles.sin()
