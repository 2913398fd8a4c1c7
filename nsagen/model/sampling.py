"""Chooses the next token: greedily or at random, per sequence by its own settings and seed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsagen.model.checks import is_number, require, require_integers, set_number
from nsagen.model.packing import to_device

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
"""Constants of splitmix64, as signed numbers."""


@dataclass(frozen=True)
class SamplingConfig:
    """How a sequence's tokens are chosen.

    The same settings and prompt give the same tokens whatever else is in the batch, as long as
    the logits are the same: the random number at a position depends only on seed and position.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token, whatever the other settings.
        top_k: choose among this many most likely tokens; 0 for all.
        top_p: of these, among the fewest whose probabilities reach top_p; 1 for all.
        seed: of the sequence.

    NumPy's numbers are stored as Python's.

    Raises:
        InvalidInputError: a value out of these ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_integers(self, ("top_k", "seed"), 0)
        for name, low, high in (("temperature", "at least 0", None), ("top_p", "above 0", 1.0)):
            set_number(self, name)
            value = getattr(self, name)
            fits = is_number(value) and (value > 0 or (value == 0 and high is None))
            require(
                fits and value <= (high or sys.float_info.max),
                "SamplingConfig",
                f"{name} must be a number {low}" + (" and at most 1" if high else ""),
                repr(value),
                "0.7 and 0.95 are usual for temperature and top_p",
            )
        for name in ("top_k", "seed"):
            require(
                getattr(self, name) < 1 << 63,
                "SamplingConfig",
                f"{name} must be below 2^63",
                str(getattr(self, name)),
                "use a smaller number",
            )


class SamplingRows:
    """The settings of a batch's rows, in memory that never moves.

    Attributes:
        temperature, top_p: float32 [rows, 1].
        top_k, seed: int64 [rows, 1].
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.temperature = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        self.top_p = torch.ones(rows, 1, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.seed = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], device: torch.device) -> SamplingRows:
        """Rows with these settings."""
        rows = cls(len(configs), device)
        rows.fill(configs)
        return rows

    def fill(self, configs: Sequence[SamplingConfig]) -> None:
        """Give the first rows these settings."""
        for name in ("temperature", "top_p", "top_k", "seed"):
            buffer = getattr(self, name)
            values = [getattr(config, name) for config in configs]
            if name == "temperature":
                values = [_in_float32(value) for value in values]
            buffer[: len(values), 0] = to_device(values, buffer.dtype, buffer.device)

    def sample(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Choose a token for each of the first rows.

        Args:
            logits: [R, vocab].
            positions: int [R], of the tokens to choose.

        Returns:
            int64 [R].
        """
        rows = logits.shape[0]
        temperature, top_k, top_p, seed = (
            t[:rows] for t in (self.temperature, self.top_k, self.top_p, self.seed)
        )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Stable, so the first of equals is the greedy choice, as with argmax.
        values, order = torch.sort(wide, dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        values = values / torch.where(temperature > 0, temperature, 1.0)
        values = values.masked_fill((top_k > 0) & (rank >= top_k), float("-inf"))
        probability = values.softmax(-1)
        before = probability.cumsum(-1) - probability
        mass = probability.masked_fill(before >= top_p, 0.0)
        total = mass.cumsum(-1)
        threshold = uniform(seed, positions[:, None].to(torch.int64)) * total[:, -1:]
        place = (total <= threshold).sum(-1, keepdim=True)
        last = (mass > 0).sum(-1, keepdim=True) - 1  # rounding must not lead past the choices
        place = torch.minimum(place, last).clamp(min=0)
        return order.gather(-1, place.masked_fill(temperature <= 0, 0)).squeeze(-1)


def _in_float32(temperature: float) -> float:
    """A temperature that can divide float32 logits; beyond its range, choices are the same."""
    return min(max(temperature, 1e-30), 1e30) if temperature > 0 else 0.0


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) for each int64 seed and position: float64, the same on any device."""
    bits = _mixed(_mixed(seed + _GOLDEN) + position * _GOLDEN)
    return _shifted(bits, 11).to(torch.float64) * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's mixing of 64 bits."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits without copies of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
