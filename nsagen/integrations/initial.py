"""What a model's new parameters start as when its dense attention becomes NSA.

A swapped model of Transformers has gates with a bias and weights of 0, so that they start as the
constants `INITIAL_GATES`: the selected and the sliding branch add up to 1, and the output is the
dense one wherever both see every token, but for the small share of the compressed branch.

A `ToyNSALlama`'s gates have no bias: with weights of 0 each is 1/2. Its compressed values start
at 0, where they have weights, so that again the other two branches alone make the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nsagen.model.checks import require
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


def mean_weights(compress_type: str, heads: int, size: int, dim: int) -> Tensor | None:
    """Compression weights with which a window's result is its mean; None for avgpool."""
    if compress_type == "avgpool":
        return None
    if compress_type == "weightedpool":
        return torch.full((heads, size), 1 / size)
    return (torch.eye(dim) / size).repeat(heads, size, 1)


@torch.no_grad()
def start_from_dense(attention: NativeSparseAttention) -> None:
    """Set a toy model's attention, whose projections are a dense module's, as said above."""
    attention.gate.weight.zero_()
    attention.intra_block_pe.zero_()
    if attention.compress_key is not None and attention.compress_value is not None:
        shape = (attention.num_kv_heads, attention.kernel_size, attention.head_dim)
        mean = mean_weights(attention.compress_type, *shape)
        assert mean is not None
        attention.compress_key.copy_(mean)
        attention.compress_value.zero_()
