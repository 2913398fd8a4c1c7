"""A small Llama with dense attention. The difference to `toy_nsa_llama.py` is the adaptation.

Weights have the names of Transformers' Llama.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nsagen.model.cache import KVCache, KVLayerCache
from nsagen.model.checkpoint_config import dense_config
from nsagen.model.checkpoints import Pretrained
from nsagen.model.checks import require, require_generator, require_kind
from nsagen.model.configs import (
    InferenceConfig,
    ToyLlamaConfig,
    ToyNSALlamaConfig,
    check_inference_config,
)
from nsagen.model.fused import own
from nsagen.model.generation import Generation
from nsagen.model.layers import FeedForward, RMSNorm, embedding, linear
from nsagen.model.logits import logits_of
from nsagen.model.memory import home_of, require_memory
from nsagen.model.packing import Packed, check_layout, check_packed, host_lengths
from nsagen.model.prefill import CachedRows
from nsagen.model.requests import check_known_tokens
from nsagen.model.rope import RotaryEmbedding
from nsagen.model.self_attention import SelfAttention

if TYPE_CHECKING:
    from typing import Self


@own
class ToyLlamaLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual connection."""

    def __init__(
        self, config: ToyLlamaConfig, rope: RotaryEmbedding, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        std = config.initializer_range
        self.self_attn = SelfAttention(
            hidden_size=config.hidden_size,
            num_q_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope=rope,
            initializer_range=std,
            generator=generator,
        )
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, std, generator)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rows: Packed | CachedRows, cache: KVLayerCache | None = None
    ) -> Tensor:
        if cache is not None and not isinstance(rows, Packed) and rows.fused:
            around = {"norm": self.input_layernorm, "residual": x}
            x = self.self_attn.fused(x, rows, cache, **around)
            return self.mlp.fused(x, self.post_attention_layernorm)
        behind = () if cache is None else (cache,)
        x = x + self.self_attn(self.input_layernorm(x), rows.cu_seqlens, rows, *behind)
        return x + self.mlp(self.post_attention_layernorm(x))


@own
class ToyLlamaModel(nn.Module):
    """A `ToyLlama` without the language model head."""

    def __init__(self, config: ToyLlamaConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        std = config.initializer_range
        self.rotary_emb = RotaryEmbedding(config.rope)
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, std, generator)
        layers = (
            ToyLlamaLayer(config, self.rotary_emb, generator)
            for _ in range(config.num_hidden_layers)
        )
        self.layers = cast(Sequence[ToyLlamaLayer], nn.ModuleList(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, rows: Packed | CachedRows, cache: KVCache | None = None
    ) -> Tensor:
        return self.norm(self.before_norm(input_ids, rows, cache))

    def before_norm(
        self, input_ids: Tensor, rows: Packed | CachedRows, cache: KVCache | None = None
    ) -> Tensor:
        """The last layer's output for tokens that follow those in the cache."""
        x = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, rows) if cache is None else layer(x, rows, cache[index])
        return x


@own
class ToyLlama(Pretrained, Generation[KVCache]):
    """A Llama-like language model with dense causal attention.

    Args:
        config: the model's structure.
        inference_config: limits of `generate`; None for a model that only runs `forward`.
        generator: source of the initial weights; None for PyTorch's own.

    Raises:
        InvalidInputError: the cache would be longer than the model has positions; an argument of
            another class.
    """

    config: ToyLlamaConfig

    def __init__(
        self,
        config: ToyLlamaConfig,
        inference_config: InferenceConfig | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        require_kind("ToyLlama", "config", config, ToyLlamaConfig, "build one")
        require(
            not isinstance(config, ToyNSALlamaConfig),
            "ToyLlama",
            "config must be that of a dense model",
            "a ToyNSALlamaConfig",
            "build a ToyNSALlama of it, or a ToyLlamaConfig",
        )
        require_generator("ToyLlama", generator)
        super().__init__()
        check_inference_config(config, inference_config)
        self.config = config
        self.inference_config = inference_config
        self.model = ToyLlamaModel(config, generator)
        self.lm_head = linear(
            config.hidden_size, config.vocab_size, config.initializer_range, generator
        )

    @classmethod
    def from_config(
        cls,
        raw: Mapping[str, Any],
        folder: Path,
        inference_config: InferenceConfig | None,
        settings: Mapping[str, Any],
    ) -> Self:
        given = [name for name, value in settings.items() if (name, value) != ("dispatcher", None)]
        require(
            not given,
            "ToyLlama.from_pretrained",
            "dense attention has no settings",
            ", ".join(given),
            "take them out, or load a ToyNSALlama",
        )
        return cls(dense_config(raw, folder), inference_config)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | Packed) -> Tensor:
        """Logits of every token of a packed batch.

        Args:
            input_ids: int64 [N], all sequences concatenated. On a CPU they are checked to be in
                the vocabulary; on a GPU only with NSAGEN_CHECK_VALUES=1.
            cu_seqlens: int32 [batch+1], where each sequence starts; the last entry is N. Or a
                layout, such as a shard of `nsagen.distributed`.

        Returns:
            float32 [N, vocab_size].

        Raises:
            InvalidInputError: shapes, dtypes, devices or tokens that do not fit; a sequence too
                long; weights that are not in memory.
        """
        limit = self.config.max_position_embeddings
        if isinstance(cu_seqlens, Packed):
            check_layout("ToyLlama.forward", input_ids, cu_seqlens, limit)
            packed = cu_seqlens
        else:
            ends = check_packed("ToyLlama.forward", input_ids, cu_seqlens, None)
            lengths = host_lengths("ToyLlama.forward", cu_seqlens, input_ids.shape[0], limit)
            packed = Packed.of(ends, input_ids.shape[0], lengths)
        require_memory("ToyLlama.forward", self, input_ids)
        check_known_tokens("ToyLlama.forward", input_ids, self.model)
        return logits_of(self.model(input_ids, packed), self.lm_head)

    def new_cache(self) -> KVCache:
        assert self.inference_config is not None
        return KVCache(self._config_here(), self.inference_config, *home_of(self))
