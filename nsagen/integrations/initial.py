"""What a model's new parameters start as when its dense attention becomes NSA.

The gates start constant: `gate` gets a bias, and weights of 0. With `INITIAL_GATES` the selected
and the sliding branch add up to 1, so that the output is the dense one wherever both see every
token, but for the small share of the compressed branch. Compression starts as the mean, and the
position embedding within a window at 0, as in every `NativeSparseAttention`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nsagen.model.checks import require
from nsagen.model.layers import linear
from nsagen.model.nsa import NativeSparseAttention

Gates = tuple[float, float, float]
"""Shares of the compressed, selected and sliding branch, each between 0 and 1."""

INITIAL_GATES: Gates = (0.002, 0.98, 0.02)
"""Small enough for the compressed branch to do no harm, large enough for it to be trained."""


def constant_gate(hidden_size: int, num_q_heads: int, gates: Gates = INITIAL_GATES) -> nn.Linear:
    """A gate projection whose sigmoid is `gates` for every token and head, whatever the input.

    Raises:
        InvalidInputError: not three numbers between 0 and 1, both excluded.
    """
    require(
        len(gates) == 3 and all(0 < gate < 1 for gate in gates),
        "gates",
        "the initial gates must be three numbers between 0 and 1: compressed, selected, sliding",
        repr(gates),
        f"{INITIAL_GATES} starts close to dense attention",
    )
    layer = nn.Linear(hidden_size, 3 * num_q_heads)
    with torch.no_grad():
        layer.weight.zero_()
        logits = torch.tensor([math.log(gate / (1 - gate)) for gate in gates])
        layer.bias.copy_(logits.repeat(num_q_heads))
    return layer


def start_from_dense(attention: NativeSparseAttention, gates: Gates = INITIAL_GATES) -> None:
    """Give a module that keeps a dense module's projections its other parameters, in place."""
    hidden_size, like = attention.q_proj.in_features, attention.q_proj.weight
    attention.gate = constant_gate(hidden_size, attention.num_q_heads, gates).to(like)
    attention.compress_key = _like(attention._mean_weights(), like)
    attention.compress_value = _like(attention._mean_weights(), like)
    shape = (attention.num_kv_heads, attention.kernel_size, attention.head_dim)
    attention.intra_block_pe = nn.Parameter(like.new_zeros(shape))


def _like(weights: nn.Parameter | None, like: Tensor) -> nn.Parameter | None:
    return None if weights is None else nn.Parameter(weights.detach().to(like))


def with_bias(gate: nn.Linear) -> nn.Linear:
    """A gate projection of the same size that has a bias, as checkpoints of swapped models do."""
    layer = linear(gate.in_features, gate.out_features, 0.0)
    layer.bias = nn.Parameter(torch.zeros(gate.out_features, device=layer.weight.device))
    return layer
