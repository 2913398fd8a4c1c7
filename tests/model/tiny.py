"""The small models that the tests in this folder share."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nsagen.model import InferenceConfig, ToyLlamaConfig, ToyNSALlama, ToyNSALlamaConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
}

SPARSITY: dict[str, Any] = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 2,
    "window_size": 32,
}


def nsa_config(**changes: Any) -> ToyNSALlamaConfig:
    """The attention of specs/tiny.yaml in a model of two small layers."""
    return ToyNSALlamaConfig(**{**SHAPE, **SPARSITY, **changes})


def dense_config(**changes: Any) -> ToyLlamaConfig:
    return ToyLlamaConfig(**{**SHAPE, **changes})


def nsa_model(
    limits: InferenceConfig | None = None, dtype: torch.dtype = torch.float64, **changes: Any
) -> ToyNSALlama:
    """A seeded model whose position embeddings and compression weights are not trivial."""
    generator = torch.Generator().manual_seed(1)
    model = ToyNSALlama(nsa_config(**changes), limits, generator=generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "compress_" in name and "_proj" not in name:
                weight += torch.randn(weight.shape, generator=generator) * 0.05
            elif "intra_block_pe" in name:
                weight.normal_(std=0.3, generator=generator)
    return model.to(dtype)


def packed_batch(lengths: list[int], vocab_size: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random input_ids int64 [N] and cu_seqlens int32 [batch+1]."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return torch.randint(0, vocab_size, (sum(lengths),), generator=generator), cu_seqlens
