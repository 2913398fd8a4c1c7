"""Initial values of a model's new parameters when its dense attention becomes NSA.

A swapped model of Transformers has gates with a bias and weights of 0, so they start as the
constants `INITIAL_GATES`: the selected and the sliding branch add up to 1, and the output is the
dense one wherever both see every token, except for the small share of the compressed branch.

A `ToyNSALlama`'s gates have no bias: with weights of 0 each is 1/2. Its compressed values start
at 0 if their weights allow it (not "avgpool" and "sigmoid_mul"), so again only the other two
branches make the output.

In an MLP gate only the last layer starts this way. Branches with their own keys and values start
with copies of the dense ones' projections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from nsagen.core.branches import BRANCHES
from nsagen.model.checks import require
from nsagen.model.compression import MLPWeights
from nsagen.model.gate import Gate, MLPGate
from nsagen.model.heads import PROJECTIONS
from nsagen.model.nsa import NativeSparseAttention

Gates = tuple[float, float, float]
"""Shares of the compressed, selected and sliding branch, each between 0 and 1."""

INITIAL_GATES: Gates = (0.002, 0.98, 0.02)
"""Small enough that the compressed branch does no harm, large enough that it can be trained."""


def constant_gate(
    hidden_size: int,
    num_q_heads: int,
    gates: Gates = INITIAL_GATES,
    on: Sequence[str] = BRANCHES,
    hidden: int | None = None,
) -> Gate:
    """A gate whose sigmoid is `gates` for every token and head, whatever the input.

    Args:
        on: the branches that have a gate.
        hidden: units of an MLP; None for a linear layer.

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
    layer = nn.Linear(hidden_size if hidden is None else hidden, len(on) * num_q_heads)
    shares = [gate for name, gate in zip(BRANCHES, gates, strict=True) if name in on]
    with torch.no_grad():
        layer.weight.zero_()
        logits = torch.tensor([math.log(gate / (1 - gate)) for gate in shares])
        layer.bias.copy_(logits.repeat(num_q_heads))
    return layer if hidden is None else MLPGate(nn.Linear(hidden_size, hidden, bias=False), layer)


@torch.no_grad()
def start_from_dense(attention: NativeSparseAttention, std: float) -> None:
    """Set the rest of a toy model's attention, whose Llama projections are set, as said above.

    Args:
        std: of the weights that start at random.
    """
    gate = attention.gate
    if isinstance(gate, MLPGate):
        nn.init.normal_(gate.up_proj.weight, std=std)
        gate.down_proj.weight.zero_()
    else:
        gate.weight.zero_()
    like = attention.o_proj.weight
    attention.add_compression(device=like.device, dtype=like.dtype)
    values = attention.compress_value
    if attention.sparsity.value_type != "sigmoid_mul" and values is not None:
        weights = values.down if isinstance(values, MLPWeights) else values
        assert isinstance(weights, nn.Parameter)
        weights.zero_()
    for branch in attention.sparsity.kv_branches:
        for name, source in zip(PROJECTIONS[branch], PROJECTIONS["selected"], strict=True):
            getattr(attention, name).weight.copy_(getattr(attention, source).weight)
