"""Configurations of the toy models and of inference. Frozen and checked when built.

Names follow the Transformers Llama configuration wherever both have the setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nsagen.core.workload import CACHE_DTYPES
from nsagen.model.checks import (
    require,
    require_head_dim,
    require_integers,
    require_numbers,
    set_number,
)
from nsagen.model.layer_cache import QUANTIZED, layer_lengths
from nsagen.model.rope import RopeConfig, llama3_scaling
from nsagen.model.sparsity import Sparsity


@dataclass(frozen=True)
class ToyLlamaConfig:
    """A Llama-like model with dense causal attention.

    Attributes:
        num_attention_heads: query heads, HQ; a multiple of num_key_value_heads, HK.
        head_dim: head size D, a multiple of 8 from 16 to 256.
        max_position_embeddings: longest sequence, in tokens.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial weights.

    Raises:
        InvalidInputError: a rule above is broken.
    """

    vocab_size: int = 128288
    max_position_embeddings: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 8
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    rope_theta: float = 500000.0
    rope_scaling: Mapping[str, Any] | None = field(default_factory=llama3_scaling)
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        where = type(self).__name__
        sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size")
        heads = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        require_integers(self, sizes + heads, 1)
        require(
            self.max_position_embeddings < 1 << 31,
            where,
            "max_position_embeddings must be below 2^31, as positions are int32",
            str(self.max_position_embeddings),
            "lower it",
        )
        require_numbers(self, ("rms_norm_eps", "initializer_range"))
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            where,
            "num_attention_heads must be a multiple of num_key_value_heads",
            f"{self.num_attention_heads} and {self.num_key_value_heads}",
            "change either, so that each key/value head serves as many query heads",
        )
        require_head_dim(where, "head_dim", self.head_dim)
        self.rope  # noqa: B018  (building it checks the rope settings)
        set_number(self, "rope_theta")

    @property
    def rope(self) -> RopeConfig:
        """The rope settings alone."""
        return RopeConfig(
            max_position_embeddings=self.max_position_embeddings,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
        )


@dataclass(frozen=True)
class ToyNSALlamaConfig(Sparsity, ToyLlamaConfig):
    """A Llama-like model with Native Sparse Attention: both classes' fields, plus one.

    Attributes:
        v_head_dim: size of a value head, by the rule of head_dim; None for head_dim.

    Raises:
        InvalidInputError: a rule of either class is broken.
    """

    v_head_dim: int | None = None

    def __post_init__(self) -> None:
        ToyLlamaConfig.__post_init__(self)
        Sparsity.__post_init__(self)
        if self.v_head_dim is not None:
            require_integers(self, ("v_head_dim",), 1)
            require_head_dim(type(self).__name__, "v_head_dim", self.v_head_dim)

    @property
    def value_dim(self) -> int:
        """Size of a value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim


@dataclass(frozen=True)
class InferenceConfig:
    """Limits of cached generation, which size the cache, and how it runs.

    Attributes:
        max_batch_size: sequences generated at once; slots of the cache.
        max_length: longest sequence in tokens, prompt and new tokens together.
        max_new_tokens: new tokens that `generate` makes by default.
        prefill_chunk_size: most prompt tokens that run at once; None for whole prompts.
        cuda_graph: capture a decoding step and replay it; CPUs have no graphs and ignore it.
        paged: keep the cache in pages that sequences take as needed, not in max_length
            tokens per slot. For Native Sparse Attention.
        page_size: tokens of a page; a multiple of the model's block_size.
        num_pages: pages in total; None for as many as full slots would take.
        share_prefixes: with paged, sequences that begin with the same tokens share those pages,
            and pages of earlier sequences are kept until others need the room.
        cache_dtype: "float8_e4m3fn" or "int8" for keys and values, also compressed ones, of one
            byte an element and a float32 scale for each head's row; None for the model's dtype.
            For Native Sparse Attention. A GPU needs compute capability 8.9 for float8.

    Raises:
        InvalidInputError: a value is not a positive integer, or a switch not a bool; prefixes
            without pages; an unknown cache_dtype.
    """

    max_batch_size: int = 32
    max_length: int = 8192
    max_new_tokens: int = 128
    prefill_chunk_size: int | None = None
    cuda_graph: bool = True
    paged: bool = False
    page_size: int = 64
    num_pages: int | None = None
    share_prefixes: bool = False
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        sizes = ("max_batch_size", "max_length", "max_new_tokens", "page_size")
        given = [n for n in ("prefill_chunk_size", "num_pages") if getattr(self, n) is not None]
        require_integers(self, (*sizes, *given), 1)
        for name in ("cuda_graph", "paged", "share_prefixes"):
            value = getattr(self, name)
            require(
                isinstance(value, bool),
                "InferenceConfig",
                f"{name} must be True or False",
                repr(value),
                "pass one of these",
            )
        require(
            self.paged or not self.share_prefixes,
            "InferenceConfig",
            "share_prefixes needs paged=True: sequences share pages",
            "paged=False",
            "set both, or neither",
        )
        require(
            self.cache_dtype is None or self.cache_dtype in CACHE_DTYPES,
            "InferenceConfig",
            f"cache_dtype must be None or one of {', '.join(CACHE_DTYPES)}",
            repr(self.cache_dtype),
            "leave it out for the model's dtype",
        )

    @property
    def pages_per_slot(self) -> int:
        """Pages that hold max_length tokens."""
        return -(-self.max_length // self.page_size)

    @property
    def total_pages(self) -> int:
        """Pages of a paged cache."""
        return self.num_pages or self.max_batch_size * self.pages_per_slot

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the cache can hold, if it is alone there."""
        pages = self.total_pages if self.paged else self.pages_per_slot
        return min(self.max_length, pages * self.page_size)

    def cache_bytes(self, config: ToyLlamaConfig, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a model's cache takes, known before anything is allocated.

        Dense: max_batch_size * max_length * num_key_value_heads * head_dim * num_hidden_layers
        * 2 (keys and values) * bytes per element. NSA adds the compressed keys and values and
        the last kernel_size keys before rope; with separate branches also the last values, and
        the sliding branch's own keys and values. A paged cache counts total_pages * page_size
        tokens instead, and 4 bytes for each page that a slot may name. With cache_dtype keys,
        values and compressed ones take a byte per element, and 4 bytes per head for a scale; the
        last kernel_size keys and values have `dtype`.
        """
        table = 4 * self.max_batch_size * self.pages_per_slot if self.paged else 0
        return table + sum(
            torch.Size(shape).numel() * self.dtype_of(name, dtype).itemsize
            for name, shape in cache_shapes(config, self).items()
        )

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tensor of the cache, for a model's dtype."""
        if name.endswith("_scale"):
            return torch.float32
        narrow = self.cache_dtype is not None and name in QUANTIZED
        return getattr(torch, str(self.cache_dtype)) if narrow else dtype


def cache_shapes(config: ToyLlamaConfig, limits: InferenceConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a model's cache; the first dimension is the layer."""
    layers, slots = config.num_hidden_layers, limits.max_batch_size
    places, length = slots, limits.max_length
    if limits.paged:
        places, length = limits.total_pages, limits.page_size
    heads, dim = config.num_key_value_heads, config.head_dim
    if not isinstance(config, ToyNSALlamaConfig):
        return dict.fromkeys(("k", "v"), (layers, places, length, heads, dim))
    size, stride = config.kernel_size, config.kernel_stride
    # At least one window, so that kernels never see an empty tensor. A page has the windows that
    # start in it.
    windows = length // stride if limits.paged else max(1, (length - size) // stride + 1)
    lengths = layer_lengths(config, length, windows, limits.cache_dtype is not None)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entries in lengths.items():
        rows = (layers, slots if name.endswith("_raw") else places, entries, heads)
        size = config.value_dim if "v" in name else dim
        shapes[name] = rows if name.endswith("_scale") else (*rows, size)
    return shapes


def check_inference_config(config: ToyLlamaConfig, limits: InferenceConfig | None) -> None:
    """Check that a cache fits its model.

    Raises:
        InvalidInputError: max_length exceeds max_position_embeddings; pages for dense attention,
            or pages that would split a block.
    """
    if limits is None:
        return
    where = "InferenceConfig"
    require(
        isinstance(limits, InferenceConfig),
        type(config).__name__,
        "inference_config must be an InferenceConfig or None",
        repr(limits),
        "build one, such as InferenceConfig(max_batch_size=4)",
    )
    require(
        limits.max_length <= config.max_position_embeddings,
        where,
        f"max_length must be at most max_position_embeddings={config.max_position_embeddings}",
        str(limits.max_length),
        "lower max_length or raise max_position_embeddings",
    )
    check_cache_dtype(config, limits)
    if not limits.paged:
        return
    require(
        isinstance(config, ToyNSALlamaConfig),
        where,
        "paged caches are for Native Sparse Attention",
        f"paged=True with {type(config).__name__}",
        "leave paged at False, or use ToyNSALlama",
    )
    assert isinstance(config, ToyNSALlamaConfig)
    block = config.block_size
    require(
        limits.page_size % block == 0,
        where,
        f"page_size must be a multiple of block_size={block}, so that a block lies in one page",
        str(limits.page_size),
        f"use a multiple of {block}, such as {-(-limits.page_size // block) * block}",
    )


def check_cache_dtype(config: ToyLlamaConfig, limits: InferenceConfig) -> None:
    """What a cache of a narrow dtype needs of its model."""
    if limits.cache_dtype is None:
        return
    where, sparse = "InferenceConfig", isinstance(config, ToyNSALlamaConfig)
    require(
        sparse,
        where,
        "cache_dtype is for Native Sparse Attention",
        f"{limits.cache_dtype} with {type(config).__name__}",
        "leave it out, or use ToyNSALlama",
    )
    assert isinstance(config, ToyNSALlamaConfig)
    require(
        config.branch_kv == "shared",
        where,
        "cache_dtype needs branches that share keys and values",
        f"branch_kv={config.branch_kv!r}",
        "leave cache_dtype out",
    )
