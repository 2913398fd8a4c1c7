"""Weights that are nowhere: PyTorch multiplies by a weight on the meta device without an error."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from nsagen.model.checks import require
from nsagen.model.fused import is_patched
from nsagen.model.rope import RotaryEmbedding


def require_memory(where: str, module: nn.Module, like: Tensor | None = None) -> None:
    """Check that no parameter or buffer of a module is on the meta device.

    Modules with hooks, or with a forward of their own instance, are skipped with all that is in
    them: offloading brings their weights when they are called. Rope tables are computed when they
    are needed.

    Args:
        like: the input of a forward; one on the meta device asks for shapes alone, which only
            weights on the meta device give.

    Raises:
        InvalidInputError: names the first such tensor.
    """
    if torch.compiler.is_compiling():
        return
    if like is not None and like.is_meta:
        held = next((p for p in module.parameters() if not p.is_meta), None)
        require(
            held is None,
            where,
            "an input on the meta device needs a model on the meta device",
            f"weights on {held.device if held is not None else None}",
            "move one of them",
        )
    elif _lacks_values(module):
        _refuse_missing(where, module)


def _lacks_values(module: nn.Module) -> bool:
    """Whether any parameter or buffer is on the meta device. Every forward waits for it: finding
    names along the way takes three times as long, so they come later."""
    found: list[nn.Module | None] = [module]
    for one in found:
        if one is None:
            continue
        own = one.__dict__
        for tensor in own["_parameters"].values():
            if tensor is not None and tensor.is_meta:
                return True
        if own["_buffers"]:
            for tensor in own["_buffers"].values():
                if tensor is not None and tensor.is_meta:
                    return True
        if own["_modules"]:
            found += own["_modules"].values()
    return False


def _refuse_missing(where: str, module: nn.Module) -> None:
    todo = [("", module)]
    for path, one in todo:
        own = one.__dict__
        for held in (own["_parameters"], own["_buffers"]):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    require(
                        False,
                        where,
                        "the weights must be in memory",
                        f"{path}{name} on the meta device",
                        "load them first, as from_pretrained does",
                    )
        for name, child in own["_modules"].items():
            if child is not None and not _may_bring(child):
                todo.append((f"{path}{name}.", child))


def _may_bring(module: nn.Module) -> bool:
    wrapped = module.__dict__["_forward_pre_hooks"] or is_patched(module)
    return bool(wrapped) or isinstance(module, RotaryEmbedding)


def home_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model computes, and its weights' dtype. Offloaded weights are on the meta device
    between their calls, so the first tensor in memory says where."""
    weight = next(model.parameters())
    if weight.is_meta:
        tensors = chain(model.parameters(), model.buffers())
        return next((t.device for t in tensors if not t.is_meta), weight.device), weight.dtype
    return weight.device, weight.dtype
