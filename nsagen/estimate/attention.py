"""Counts what attention computes and reads: a sequence's operations, a step's keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsagen.model import ToyLlamaConfig, ToyNSALlamaConfig

if TYPE_CHECKING:  # which needs pydantic
    from nsagen.spec import AttentionShape


@dataclass(frozen=True)
class MemberConfig(ToyLlamaConfig):
    """A Llama's sizes, with another member of the family than NSA in every layer.

    Attributes:
        shape: of the attention; an index has a head for each key/value head.
        dense_decode: whether a new token attends to everything.
    """

    shape: AttentionShape | None = None
    dense_decode: bool = False

    @property
    def attention(self) -> AttentionShape:
        assert self.shape is not None
        return self.shape

    @property
    def index_dim(self) -> int:
        """Elements of an index key; 0 without an index."""
        return self.attention.index_head_dim

    @property
    def own_weights(self) -> int:
        """Parameters of a layer that a Llama lacks: index projections and norms, an output gate."""
        heads = self.num_key_value_heads
        index = self.hidden_size * (heads + 1) * self.index_dim + 2 * self.index_dim
        gated = self.attention.output_gate != "none"
        return index + gated * self.hidden_size * self.num_attention_heads * self.head_dim

    def dense(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens attends to everything."""
        return tokens < self.attention.dense_len

    def windows(self, tokens: int) -> int:
        return max(0, (tokens - self.attention.kernel_size) // self.attention.kernel_stride + 1)


def head_dims(config: ToyLlamaConfig) -> tuple[int, int]:
    """Sizes of a key's and of a value's head."""
    return config.head_dim, getattr(config, "value_dim", config.head_dim)


@dataclass(frozen=True)
class Pairs:
    """Products of a query and a key, and of a probability and a value."""

    scores: float
    sums: float

    def operations(self, config: ToyLlamaConfig) -> float:
        """Operations of one query head."""
        k_dim, v_dim = head_dims(config)
        return 2 * (k_dim * self.scores + v_dim * self.sums)


def attended_pairs(config: ToyLlamaConfig, tokens: int) -> Pairs:
    """What attention computes in a sequence of `tokens`.

    For NSA, the branches that are on: windows, whose scores the selection computes once more,
    blocks, and the sliding window. Selection needs the windows' scores, but not their values.
    """
    if isinstance(config, MemberConfig):
        found = learned_pairs(config, tokens)
        return Pairs(found.scores + _ranked(config, tokens), found.sums)
    if not isinstance(config, ToyNSALlamaConfig):
        return Pairs(_capped(tokens, tokens), _capped(tokens, tokens))
    seen = _seen(tokens, config.kernel_size, config.kernel_stride)
    scores = sums = 0.0
    if config.needs_windows:
        scores, sums = seen, seen
    if "selected" in config.on:
        scores += seen
        blocks = _capped(tokens, config.topk * config.block_size)
        scores, sums = scores + blocks, sums + blocks
    if "sliding" in config.on:
        near = _capped(tokens, config.window_size)
        scores, sums = scores + near, sums + near
    return Pairs(scores, sums)


def learned_pairs(config: ToyLlamaConfig, tokens: int) -> Pairs:
    """The part of `attended_pairs` that has gradients. Of another member than NSA that is attention
    to blocks, without what ranks them."""
    if not isinstance(config, MemberConfig):
        return attended_pairs(config, tokens)
    shape = config.attention
    limit = tokens if config.dense(tokens) else shape.topk * shape.block_size
    return Pairs(_capped(tokens, limit), _capped(tokens, limit))


def _ranked(config: MemberConfig, tokens: int) -> float:
    """Products that rank blocks, as if each had the size of a query head's."""
    shape = config.attention
    if config.dense(tokens):
        return 0.0
    seen = _seen(tokens, shape.kernel_size, shape.kernel_stride)
    if config.index_dim:
        heads = config.num_attention_heads * config.head_dim
        return seen * config.num_key_value_heads * config.index_dim / heads
    return seen * (1 + 1 / shape.lse_windows if shape.score_norm == "softmax" else 1)


def _capped(tokens: int, limit: int) -> float:
    """Sum of min(t + 1, limit) over all tokens."""
    full = max(0, tokens - limit)
    short = min(tokens, limit)
    return full * limit + short * (short + 1) / 2


def _seen(tokens: int, size: int, stride: int) -> float:
    """Windows that queries see, over all tokens."""
    windows = max(0, (tokens - size) // stride + 1)
    rest = max(0, tokens - size + 1) - stride * max(0, windows - 1)
    return stride * windows * (windows - 1) / 2 + rest * windows


def keys_read(config: ToyLlamaConfig, context: int) -> int:
    """Keys, and equally many values, that a decoding step reads of one sequence and head.

    What ranks another member's blocks counts as keys and values of as many bytes.
    """
    if isinstance(config, MemberConfig) and not (config.dense_decode or config.dense(context)):
        row = config.num_key_value_heads * sum(head_dims(config))
        ranks = config.windows(context) * config.num_key_value_heads * config.head_dim
        if config.index_dim:
            ranks = context * config.index_dim
        blocks = config.attention.topk * config.attention.block_size
        return math.ceil(ranks / row) + min(context, blocks)
    if not isinstance(config, ToyNSALlamaConfig):
        return context
    read = 0
    if config.needs_windows:
        read += max(0, (context - config.kernel_size) // config.kernel_stride + 1)
    if "selected" in config.on:
        read += min(context, config.topk * config.block_size)
    if "sliding" in config.on:
        read += min(context, config.window_size)
    return read
