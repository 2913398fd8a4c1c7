"""The parts of a Llama layer that have nothing to do with attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nsagen import ops
from nsagen.model.layers import RMSNorm, linear, project


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_project_does_what_the_layers_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, n, generator=generator).to(dtype) for n in (16, 8))
    norm, layer = RMSNorm(16, 1e-5), linear(16, 16, 1.0, generator)
    norm.weight.copy_(torch.rand(16, generator=generator))
    norm, weight = norm.to(dtype), layer.to(dtype).weight.detach()
    kwargs = {"norm": norm, "residual": residual, "swiglu": True}
    gate, up = F.linear(norm(x), weight).chunk(2, -1)
    torch.testing.assert_close(project(x, weight, **kwargs), residual + F.silu(gate) * up)
    op = ops.linear_decode(
        x, weight, norm_weight=norm.weight, eps=1e-5, residual=residual, swiglu=True
    )
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert (op - project(x, weight, **kwargs)).norm() <= bound * op.norm()
    gated = project(x, weight, sigmoid_from=10)
    plain = F.linear(x, weight)
    torch.testing.assert_close(gated, torch.cat([plain[:, :10], plain[:, 10:].sigmoid()], 1))
