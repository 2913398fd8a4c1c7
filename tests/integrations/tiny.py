"""Tiny random models of every kind that NSA fits into, and what tests say about them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nsagen.core.errors import InvalidInputError
from nsagen.integrations.transformers import apply_nsa
from nsagen.integrations.transformers_models import MODELS, Facts

ATTENTION = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 4, "window_size": 12}
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of Transformers calls the cache."""

KINDS = {facts.name: facts for facts in MODELS}

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA: dict[str, Any] = {
    **_SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
"""Sizes of a Llama with heads of 32."""

_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_OWN: dict[str, dict[str, Any]] = {
    "Gemma3": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 24,
        "query_pre_attn_scalar": 20,
    },
    "Mixtral": _EXPERTS,
    "Qwen3Moe": _EXPERTS,
    "Granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "Phi3": {
        "hidden_size": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
}


def build(facts: Facts, head: str = "ForCausalLM", **changes: Any) -> Any:
    """A dense model whose attention is far from uniform."""
    config = facts.config_class(**{**_SIZES, **_OWN.get(facts.name, {}), **changes})
    torch.manual_seed(0)
    return facts.kind(head)(config).eval()


_dense = functools.cache(build)


def dense(kind: str = "Llama") -> Any:
    return copy.deepcopy(_dense(KINDS[kind]))


def sparse(kind: str = "Llama", **changes: Any) -> Any:
    return apply_nsa(dense(kind), {**ATTENTION, **changes})


def trained(model: Any) -> Any:
    """The model with new parameters that differ from their initial values."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".gate.weight", "compress_", "intra_block_pe")):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def as_dense(model: Any) -> Any:
    """The model with NSA that is dense: the selected branch alone, every block, gates of 1."""
    settings: Mapping[str, Any] = {**ATTENTION, "topk": 64, "branches": ("selected",)}
    swapped = apply_nsa(copy.deepcopy(model), settings)
    with torch.no_grad():
        for name, parameter in swapped.named_parameters():
            if name.endswith(".self_attn.gate.bias"):
                parameter.fill_(60.0)  # its sigmoid is 1 in float32
    return swapped


def tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def in_pieces(
    model: Any, ids: Tensor, cuts: Sequence[int], cache: Any = None, **more: Any
) -> tuple[Tensor, Any]:
    """Logits of tokens that come up to each cut, and the cache that they leave."""
    logits, first = [], 0 if cache is None else cache.get_seq_length()
    for end in cuts:
        out = model(ids[:, first:end], **{CACHE: cache}, use_cache=True, **more)
        cache, first = getattr(out, CACHE), end
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


def refused(text: str, model: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(InvalidInputError, match=text), torch.no_grad():
        model(*args, **kwargs)
