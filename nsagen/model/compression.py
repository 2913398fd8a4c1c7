"""The weights that compress a window of keys, or of values, into one token.

With the initial weights a window's result is its mean: exactly, except for "mlp" with fewer than
two hidden units per component. Near 0, silu is only half of a line; two units that see +x and -x
make a whole one, silu(x) - silu(-x) = x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsagen.model.fused import own

Weights = Tensor | tuple[Tensor, Tensor] | None
"""What `ops.compress` takes: None for "avgpool", two tensors for "mlp"."""

MLP_INPUT = 0.25
"""Factor by which a unit that is alone for its component multiplies the mean m: its result is
m * (1 + tanh(MLP_INPUT * m / 2)). Smaller is nearer to the mean, and slower to train."""


def local_of(weight: Tensor) -> Tensor:
    """This process's part of a weight that tensor parallelism has spread; any other as it is."""
    to_local = getattr(weight, "to_local", None)  # importing DTensor takes a while
    return weight if to_local is None else to_local()


@own
class PlainWeights(nn.Module):
    """One tensor in its own module, so that adapters can name it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, like: Tensor) -> Tensor:
        """The weights in the dtype of `like`."""
        return local_of(self.weight).to(like.dtype)


@own
class MLPWeights(nn.Module):
    """The two layers of "mlp" compression: silu(x @ up) @ down for each head.

    Attributes:
        up: [HK, kernel_size * dim, hidden], the window's tokens flattened.
        down: [HK, hidden, dim].
    """

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The weights in the dtype of `like`."""
        return local_of(self.up).to(like.dtype), local_of(self.down).to(like.dtype)


Holder = nn.Parameter | nn.Module | None
"""What a module keeps of one compression."""


def mean_weights(
    compress_type: str,
    heads: int,
    size: int,
    dim: int,
    hidden: int,
    generator: torch.Generator | None = None,
) -> Weights:
    """Weights with which a window of `size` tokens of `dim` becomes its mean, or close to it.

    Args:
        hidden: units of "mlp"; with fewer than `dim` the last components are 0, and units past
            2 * dim start at random and do not affect the result yet.
    """
    mean = torch.eye(dim) / size
    if compress_type == "avgpool":
        return None
    if compress_type == "weightedpool":
        return torch.full((heads, size), 1 / size)
    if compress_type == "sigmoid_mul":  # 2 * sigmoid(0) = 1
        return torch.zeros(heads, size, dim)
    if compress_type == "linear":
        return mean.repeat(heads, size, 1)
    up, down = _mean_units(dim, hidden)
    up, down = (up / size).repeat(heads, size, 1), down.repeat(heads, 1, 1)
    spare = up[:, :, 2 * dim :]
    nn.init.normal_(spare, std=(size * dim) ** -0.5, generator=generator)
    return up, down


def _mean_units(dim: int, hidden: int) -> tuple[Tensor, Tensor]:
    """[dim, hidden] and [hidden, dim] with silu(m @ up) @ down close to m.

    The first `dim` units see one component each; of the remaining ones, up to `dim` see the same
    components with a minus.
    """
    units = torch.arange(min(hidden, 2 * dim))
    component = units % dim
    sign = torch.where(units < dim, 1.0, -1.0)
    paired = component < hidden - dim
    up, down = torch.zeros(dim, hidden), torch.zeros(hidden, dim)
    up[component, units] = torch.where(paired, sign, MLP_INPUT)
    down[units, component] = torch.where(paired, sign, 2 / MLP_INPUT)
    return up, down


def holder_of(weights: Weights, **where: Any) -> Holder:
    """Trainable weights; `where`: their device and dtype."""
    if isinstance(weights, tuple):
        return MLPWeights(*(tensor.to(**where) for tensor in weights))
    return None if weights is None else nn.Parameter(weights.to(**where))


def weights_of(holder: Holder, like: Tensor) -> Weights:
    """The weights as an op takes them, in the dtype of `like`.

    A module is called, not read, because adapters may have wrapped it.
    """
    if isinstance(holder, nn.Module):
        return holder(like)
    return None if holder is None else local_of(holder).to(like.dtype)
