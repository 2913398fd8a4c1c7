"""What a model of Transformers gets beside a shard: the positions of its tokens.

Models with `attn_implementation="nsagen"` turn queries and keys by `position_ids` before their
attention sees a shard. A hook of the model fills these in, and refuses what a shard does not go
with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nsagen.distributed.shard import Shard
from nsagen.model.checks import require
from nsagen.model.forms import IMPLEMENTATION
from nsagen.model.packing import SHARD

_BESIDE = (
    "labels",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cu_seq_lens_q",
    "use_cache",
)


def takes_shards(module: nn.Module) -> bool:
    """Whether an attention module of Transformers hands shards to nsagen's attention function."""
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) == IMPLEMENTATION


def watch_shards(model: nn.Module) -> None:
    """Let calls of a model of Transformers with a shard have its positions, and no labels; once."""
    hooks: list[Any] = []
    if hasattr(getattr(model, "config", None), "_attn_implementation"):
        hooks.append(_refuse_labels)
    if any(takes_shards(module) for module in model.modules()):
        hooks.append(_place)
    known = [*model._forward_pre_hooks.values()]
    for hook in hooks:
        if hook not in known:
            model.register_forward_pre_hook(hook, with_kwargs=True)


def _refuse_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get(SHARD) is not None and kwargs.get("labels") is not None:
        rule = "goes with no labels: a token's successor may be on another rank"
        advice = "shift the targets, take their rows by shard.take, and compute the loss of these"
        require(False, SHARD, rule, "labels", advice)


def _place(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    shard = kwargs.get(SHARD)
    if shard is None:
        return None
    made = isinstance(shard, Shard)
    require(made, SHARD, "must be a shard", repr(shard), "make it with ContextParallel.shard")
    beside = [
        name for name in _BESIDE if kwargs.get(name) is not None and kwargs[name] is not False
    ]
    require(not beside, SHARD, "says where all tokens are", ", ".join(beside), "leave it out")
    rows = shard.positions.shape[0]
    tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    shape = None if tokens is None else list(tokens.shape[:2])
    rule = f"needs input_ids of shape [1, {rows}], by name or first"
    require(shape == [1, rows], SHARD, rule, str(shape), "pass shard.take(input_ids)[None]")
    given = {SHARD: replace(shard, placed=True), "use_cache": False}
    return args, {**kwargs, **given, "position_ids": shard.positions.to(torch.int64)[None]}
