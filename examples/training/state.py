"""The optimizer, and its state and the model's as tensors that have names.

The tensors are whole, whatever the model is spread over: any number of processes can go on from
what any other number has saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


FUSED = ("cuda",)
"""Devices on which one launch updates many weights; the host does next to nothing then."""


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW. Linear maps and embeddings decay; norms and what compresses windows does not."""
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": decay} for decay in (weight_decay, 0.0)
    ]
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and parameter.ndim == 2
        group = groups[0 if matrix else 1]
        group["params"].append(parameter)
        group["names"].append(name)
    fused = next(model.parameters()).device.type in FUSED
    return _AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused or None)


class _AdamW(torch.optim.AdamW):
    """AdamW of each process's own parts: an update needs no other, and plain tensors can share a
    launch, whatever mesh they are of. The state stays spread as the parameters are."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        found = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = own_parts(tensors)
        return found


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts of tensors that are spread; others as they are."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All state, on the CPU; all processes call it, and the first one gets it."""
    weights = get_model_state_dict(model, options=_WHOLE)
    state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    tensors = {f"model.{name}": one for name, one in weights.items() if isinstance(one, Tensor)}
    moments = cast(dict[str, dict[str, Tensor]], state.get("state", {}))
    for name, parts in moments.items():
        tensors |= {f"optimizer.{name}.{part}": one for part, one in parts.items()}
    return tensors


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `collect` gave; all processes call it with the same tensors."""
    weights: dict[str, Any] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.partition(".")
        if owner == "model":
            weights[name] = tensor
        else:
            name, _, part = name.rpartition(".")
            moments.setdefault(name, {})[part] = tensor
    groups = [{**group, "params": group["names"]} for group in optimizer.param_groups]
    state: dict[str, Any] = {"state": moments, "param_groups": groups}
    set_model_state_dict(model, weights, options=_WHOLE)
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)
