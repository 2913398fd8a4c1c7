"""The parts of a Llama layer other than attention."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsagen import ops
from nsagen.model.fused import JoinsWeights, own


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
    """A linear layer without bias, weights drawn from a normal distribution around 0.

    It is exactly an `nn.Linear`: quantizers and adapters find layers by their class.
    """
    layer = cast(nn.Linear, _BareLinear(in_features, out_features, bias=False))
    layer.__class__ = nn.Linear
    nn.init.normal_(layer.weight, std=std, generator=generator)
    return layer


def embedding(
    rows: int, dim: int, std: float, generator: torch.Generator | None = None
) -> nn.Embedding:
    """An embedding, weights drawn from a normal distribution around 0."""
    layer = cast(nn.Embedding, _BareEmbedding(rows, dim))
    layer.__class__ = nn.Embedding
    nn.init.normal_(layer.weight, std=std, generator=generator)
    return layer


@own
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or more."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


FUSED_ROWS = 16
"""Most rows for which a GPU runs a product and its following operations in one launch.

At 4 rows on an H200 the guide's products with what follows took 13.8 + 12.8 + 60.1 + 31.9 us a
layer in a graph, cuBLAS's alone 16.2 + 14.6 + 58.3 + 33.5. Above 16 rows cuBLAS gains: it reads x
less often.
"""


def project(
    x: Tensor,
    weight: Tensor,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    sigmoid_from: int | None = None,
    dispatcher: Any = None,
) -> Tensor:
    """x @ weight.T with its surrounding operations, by one kernel for up to FUSED_ROWS rows.

    Without gradients.

    Args:
        x: [N, in_features].
        weight: [out_features, in_features].
        norm: applied to x first.
        residual: added to the result, [N, out_features].
        swiglu: the first half of the outputs are gates: silu(gate) * other half.
        sigmoid_from: outputs from this one on go through a sigmoid.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.

    Returns:
        [N, out_features], or half as many with `swiglu`.
    """
    if x.shape[0] <= (FUSED_ROWS if x.is_cuda else ops.LINEAR_DECODE_ROWS) and ops.on_kernels(x):
        return ops.linear_decode(
            x,
            weight,
            norm_weight=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            residual=residual,
            swiglu=swiglu,
            sigmoid_from=sigmoid_from,
            dispatcher=dispatcher,
        )
    # Under autocast a product has another dtype than the cache and the residual stream.
    y = F.linear(x if norm is None else norm(x), weight).to(x.dtype)
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    if sigmoid_from is not None:
        y[:, sigmoid_from:].sigmoid_()
    return y if residual is None else residual + y


@own
class FeedForward(JoinsWeights):
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

    def joined_layers(self) -> list[nn.Linear]:
        return [self.gate_proj, self.up_proj]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def fused(self, x: Tensor, norm: RMSNorm, dispatcher: Any = None) -> Tensor:
        """x + forward(norm(x)), for inference: two products."""
        weight = self.joined_weight()
        hidden = project(x, weight, norm=norm, swiglu=True, dispatcher=dispatcher)
        return project(hidden, self.down_proj.weight, residual=x, dispatcher=dispatcher)
