"""The parts of a Llama layer that have nothing to do with attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _BareLinear(nn.Linear):
    """A linear layer that leaves its weights to `linear`, which fills them once."""

    def reset_parameters(self) -> None:
        pass


class _BareEmbedding(nn.Embedding):
    """An embedding that leaves its weights to `embedding`, which fills them once."""

    def reset_parameters(self) -> None:
        pass


def linear(
    in_features: int, out_features: int, std: float, generator: torch.Generator | None = None
) -> nn.Linear:
    """A linear layer without bias, weights drawn from a normal distribution around 0."""
    layer = _BareLinear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, std=std, generator=generator)
    return layer


def embedding(
    rows: int, dim: int, std: float, generator: torch.Generator | None = None
) -> nn.Embedding:
    """An embedding, weights drawn from a normal distribution around 0."""
    layer = _BareEmbedding(rows, dim)
    nn.init.normal_(layer.weight, std=std, generator=generator)
    return layer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or more."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)): x [N, hidden_size] to the same shape."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size, std, generator)
        self.up_proj = linear(hidden_size, intermediate_size, std, generator)
        self.down_proj = linear(intermediate_size, hidden_size, std, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
