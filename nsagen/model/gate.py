"""The gates of the branches: one number from 0 to 1 per token, head and branch that is on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsagen.core.branches import BRANCHES
from nsagen.model.fused import own
from nsagen.model.layers import linear, project


@own
class MLPGate(nn.Module):
    """down(silu(up(x)))."""

    def __init__(self, up_proj: nn.Linear, down_proj: nn.Linear) -> None:
        super().__init__()
        self.up_proj, self.down_proj = up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))


Gate = nn.Linear | MLPGate


def new_gate(
    inputs: int,
    outputs: int,
    hidden: int | None,
    std: float,
    generator: torch.Generator | None = None,
) -> Gate:
    """A gate before its sigmoid; `hidden` units between, or None for one linear layer."""
    if hidden is None:
        return linear(inputs, outputs, std, generator)
    up = linear(inputs, hidden, std, generator)
    return MLPGate(up, linear(hidden, outputs, std, generator))


def first_layer(gate: Gate) -> nn.Linear:
    """The layer that reads x: it can join other layers' product."""
    return gate.up_proj if isinstance(gate, MLPGate) else gate


def after_first_layer(gate: Gate, y: Tensor, dispatcher: Any) -> Tensor:
    """The gate from the output y of its first layer; without gradients. A linear gate's y has
    already been through the sigmoid."""
    if not isinstance(gate, MLPGate):
        return y
    return project(F.silu(y), gate.down_proj.weight, sigmoid_from=0, dispatcher=dispatcher)


def in_columns(gate: Tensor, on: Sequence[str]) -> Tensor:
    """[..., 3] with zeros for branches that are off, from [..., branches that are on]."""
    if len(on) == len(BRANCHES):
        return gate
    columns = dict(zip(on, gate.unbind(-1), strict=True))
    zeros = torch.zeros_like(gate[..., 0])
    return torch.stack([columns.get(name, zeros) for name in BRANCHES], -1)
