"""Rotary position embedding: settings, frequencies and tables.

Rotate-half convention and `llama3` scaling as in Transformers' Llama, so its checkpoints mean
the same here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsagen.model.checks import require, require_integers, require_numbers
from nsagen.model.fused import own

_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def llama3_scaling() -> dict[str, Any]:
    """The `rope_scaling` of Llama 3.1: 8192 trained positions stretched eightfold."""
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        max_position_embeddings: number of positions in the tables, P.
        head_dim: head size D; even.
        rope_theta: base of the frequencies.
        rope_scaling: None for plain rope; or a mapping with `rope_type` "default" or "llama3",
            the latter with `factor`, `low_freq_factor`, `high_freq_factor` and
            `original_max_position_embeddings`.

    Raises:
        InvalidInputError: a rule above is broken.
    """

    max_position_embeddings: int = 131072
    head_dim: int = 128
    rope_theta: float = 500000.0
    rope_scaling: Mapping[str, Any] | None = field(default_factory=llama3_scaling)

    def __post_init__(self) -> None:
        require_integers(self, ("max_position_embeddings", "head_dim"), 1)
        require_numbers(self, ("rope_theta",))
        require(
            self.head_dim % 2 == 0,
            "RopeConfig",
            "head_dim must be even, for rope turns pairs",
            str(self.head_dim),
            "use an even head_dim",
        )
        _check_rope_scaling(self.rope_scaling)

    @property
    def rope_type(self) -> str:
        """One of "default" and "llama3"."""
        return _rope_type(self.rope_scaling or {})


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return scaling.get("rope_type", scaling.get("type", "default"))


def _check_rope_scaling(scaling: Mapping[str, Any] | None) -> None:
    where = "RopeConfig: rope_scaling"
    if scaling is None:
        return
    require(
        isinstance(scaling, Mapping),
        where,
        "must be a mapping or None",
        repr(scaling),
        "pass the rope_scaling of the checkpoint's config.json",
    )
    kind = _rope_type(scaling)
    require(
        kind in ("default", "llama3"),
        where,
        "rope_type must be one of default, llama3",
        repr(kind),
        "use a model that was trained with one of these: with another rope its weights give wrong "
        "results (apply_nsa of nsagen.integrations.transformers takes a model with any rope)",
    )
    wanted = set(_LLAMA3_KEYS) if kind == "llama3" else set()
    given = set(scaling) - {"rope_type", "type"}
    require(
        given == wanted,
        where,
        f"rope_type {kind} takes exactly the keys {', '.join(sorted(wanted)) or '(none)'}",
        ", ".join(sorted(given)) or "none",
        "name the rope_type that they belong to, or take them out if the model has plain rope"
        if kind == "default"
        else "add the missing ones and take out the others",
    )
    for name in sorted(wanted):
        value = scaling[name]
        require(
            isinstance(value, int | float) and value > 0,
            where,
            f"{name} must be a positive number",
            repr(value),
            "copy it from the checkpoint's config.json",
        )
    require(
        kind == "default" or scaling["low_freq_factor"] < scaling["high_freq_factor"],
        where,
        "low_freq_factor must be below high_freq_factor",
        f"{scaling.get('low_freq_factor')} and {scaling.get('high_freq_factor')}",
        "swap them if they are the wrong way round",
    )


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """Radians per token by which each pair of a head turns: float32 [D/2].

    Plain: theta^(-2i/D). "llama3" keeps frequencies whose wavelength is below
    original/high_freq_factor, divides those above original/low_freq_factor by `factor`, and
    blends linearly, in original/wavelength, between the two.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    frequencies = 1.0 / (config.rope_theta ** (even / config.head_dim))
    if config.rope_type == "default":
        return frequencies
    scaling = config.rope_scaling or {}
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


def rope_tables(config: RopeConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and pair: two float32 tensors [P, D/2] on the CPU."""
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos(), angles.sin()


class Tables(NamedTuple):
    """Rope tables: float32 [P, D/2] each."""

    cos: Tensor
    sin: Tensor


@own
class RotaryEmbedding(nn.Module):
    """Holds the rope tables of a model; all its layers share one.

    The tables are non-persistent buffers `cos` and `sin`, float32 [P, D/2]. They follow
    `.to(device)` but stay float32 whatever dtype the model is cast to: in bfloat16 neighbouring
    positions would share their slow rotations. No checkpoint has them: a model that was built on
    the meta device computes them at the first use, however its weights came.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.config = config
        cos, sin = rope_tables(config)
        device = torch.get_default_device()
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def tables(self, like: Tensor) -> Tables:
        """The tables for an input, where it is if they are computed now."""
        if (self.cos.is_meta or self.sin.is_meta) and not like.is_meta:
            with torch.inference_mode(False):
                self._compute(like.device)
        return Tables(self.cos, self.sin)

    def _compute(self, device: torch.device) -> None:
        self.cos, self.sin = (table.to(device) for table in rope_tables(self.config))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        exact = (self.cos, self.sin)
        if not any(table.is_meta for table in exact):
            super()._apply(fn, recurse)
            self.cos, self.sin = (table.to(self.cos.device) for table in exact)
            return self
        try:
            super()._apply(fn, recurse)
        except NotImplementedError:  # `to(device)` refuses what has no values; the weights have
            return self
        if not self.cos.is_meta:
            self._compute(self.cos.device)
        return self

    def extra_repr(self) -> str:
        positions, pairs = self.cos.shape
        return f"positions={positions}, head_dim={2 * pairs}, type={self.config.rope_type}"
