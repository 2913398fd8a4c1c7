"""Counts what attention computes and reads: a sequence's operations, a step's keys."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.model import ToyLlamaConfig, ToyNSALlamaConfig


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

    def capped(limit: int) -> float:
        """Sum of min(t + 1, limit) over all tokens."""
        full = max(0, tokens - limit)
        short = min(tokens, limit)
        return full * limit + short * (short + 1) / 2

    if not isinstance(config, ToyNSALlamaConfig):
        return Pairs(capped(tokens), capped(tokens))
    size, stride = config.kernel_size, config.kernel_stride
    windows = max(0, (tokens - size) // stride + 1)
    rest = max(0, tokens - size + 1) - stride * max(0, windows - 1)
    seen = stride * windows * (windows - 1) / 2 + rest * windows
    scores = sums = 0.0
    if config.needs_windows:
        scores, sums = seen, seen
    if "selected" in config.on:
        scores += seen
        blocks = capped(config.topk * config.block_size)
        scores, sums = scores + blocks, sums + blocks
    if "sliding" in config.on:
        near = capped(config.window_size)
        scores, sums = scores + near, sums + near
    return Pairs(scores, sums)


def keys_read(config: ToyLlamaConfig, context: int) -> int:
    """Keys, and equally many values, that a decoding step reads of one sequence and head."""
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
