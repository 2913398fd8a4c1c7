"""A small Llama with Native Sparse Attention. Compare it with `toy_llama.py`, which is dense.

Weights have the names of Transformers' Llama.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nsagen.model.cache import NSACache, NSALayerCache
from nsagen.model.checkpoint_config import nsa_config
from nsagen.model.checkpoints import Pretrained
from nsagen.model.checks import require_dispatcher, require_generator, require_kind
from nsagen.model.configs import InferenceConfig, ToyNSALlamaConfig, check_inference_config
from nsagen.model.fused import own
from nsagen.model.generation import Generation
from nsagen.model.initial import start_from_dense
from nsagen.model.layers import FeedForward, RMSNorm, embedding, linear
from nsagen.model.logits import logits_of
from nsagen.model.memory import home_of, require_memory
from nsagen.model.nsa import NativeSparseAttention
from nsagen.model.packing import Packed, check_layout, check_packed
from nsagen.model.prefill import CachedRows
from nsagen.model.requests import check_known_tokens
from nsagen.model.rope import RotaryEmbedding

if TYPE_CHECKING:
    from typing import Self


@own
class ToyNSALlamaLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual connection."""

    def __init__(
        self,
        config: ToyNSALlamaConfig,
        rope: RotaryEmbedding,
        dispatcher: Any,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        std = config.initializer_range
        self.self_attn = NativeSparseAttention(
            hidden_size=config.hidden_size,
            num_q_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            v_head_dim=config.v_head_dim,
            **config.settings(),
            rope=rope,
            dispatcher=dispatcher,
            initializer_range=std,
            generator=generator,
        )
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, std, generator)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rows: Packed | CachedRows, cache: NSALayerCache | None = None
    ) -> Tensor:
        if cache is not None and not isinstance(rows, Packed) and rows.fused:
            around = {"norm": self.input_layernorm, "residual": x}
            x = self.self_attn.fused(x, rows, cache, **around)
            return self.mlp.fused(x, self.post_attention_layernorm, self.self_attn.dispatcher)
        behind = () if cache is None else (cache,)
        x = x + self.self_attn(self.input_layernorm(x), rows.cu_seqlens, rows, *behind)
        return x + self.mlp(self.post_attention_layernorm(x))


@own
class ToyNSALlamaModel(nn.Module):
    """A `ToyNSALlama` without the language model head."""

    def __init__(
        self, config: ToyNSALlamaConfig, dispatcher: Any, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        std = config.initializer_range
        self.rotary_emb = RotaryEmbedding(config.rope)
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, std, generator)
        layers = (
            ToyNSALlamaLayer(config, self.rotary_emb, dispatcher, generator)
            for _ in range(config.num_hidden_layers)
        )
        self.layers = cast(Sequence[ToyNSALlamaLayer], nn.ModuleList(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, rows: Packed | CachedRows, cache: NSACache | None = None
    ) -> Tensor:
        return self.norm(self.before_norm(input_ids, rows, cache))

    def before_norm(
        self, input_ids: Tensor, rows: Packed | CachedRows, cache: NSACache | None = None
    ) -> Tensor:
        """The last layer's output for tokens that follow those in the cache."""
        x = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, rows) if cache is None else layer(x, rows, cache[index])
        return x


@own
class ToyNSALlama(Pretrained, Generation[NSACache]):
    """A Llama-like language model with Native Sparse Attention.

    Args:
        config: the model's structure.
        inference_config: limits of `generate`; None for a model that only runs `forward`.
        dispatcher: generated kernels to use on a GPU, e.g. `generated.llama8b.dispatcher`; None
            for nsagen's own choice.
        generator: source of the initial weights; None for PyTorch's own.

    Raises:
        InvalidInputError: the cache would be longer than the model has positions; an argument of
            another class.
    """

    config: ToyNSALlamaConfig

    def __init__(
        self,
        config: ToyNSALlamaConfig,
        inference_config: InferenceConfig | None = None,
        dispatcher: Any = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        require_kind("ToyNSALlama", "config", config, ToyNSALlamaConfig, "build one")
        require_dispatcher("ToyNSALlama", dispatcher)
        require_generator("ToyNSALlama", generator)
        super().__init__()
        check_inference_config(config, inference_config)
        self.config = config
        self.inference_config = inference_config
        self.dispatcher = dispatcher
        self.model = ToyNSALlamaModel(config, dispatcher, generator)
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
        attention = dict(settings)
        dispatcher = attention.pop("dispatcher", None)
        return cls(nsa_config(raw, folder, attention), inference_config, dispatcher)

    def start_from_dense(self) -> None:
        for layer in self.model.layers:
            start_from_dense(layer.self_attn, self.config.initializer_range)

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
            check_layout("ToyNSALlama.forward", input_ids, cu_seqlens, limit)
            packed = cu_seqlens
        else:
            cu_seqlens = check_packed("ToyNSALlama.forward", input_ids, cu_seqlens, limit)
            config = self.config
            windows = (config.kernel_size, config.kernel_stride) if config.needs_windows else None
            packed = Packed.of(cu_seqlens, input_ids.shape[0], windows=windows)
        require_memory("ToyNSALlama.forward", self, input_ids)
        check_known_tokens("ToyNSALlama.forward", input_ids, self.model)
        return logits_of(self.model(input_ids, packed), self.lm_head)

    def new_cache(self) -> NSACache:
        assert self.inference_config is not None
        return NSACache(self._config_here(), self.inference_config, *home_of(self))
