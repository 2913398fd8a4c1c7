"""Rope tables for any rope type of Transformers, from the model's own frequencies.

A table has a row a position and a column a pair of a head's components. What a type does to the
frequencies (yarn, longrope, dynamic, llama3, linear) and to the length of what it turns is in them.
Where rope turns only a part of a head, the other pairs have an angle of 0, and `arranged` brings
queries and keys into the order that the tables pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nsagen.model.checks import require
from nsagen.model.rope import Tables

ROUND = 256
"""Positions that the tables of a cache are a multiple of."""


@dataclass(frozen=True)
class Rope:
    """The tables of one call.

    Attributes:
        tables: cos and sin, float32 [P, D/2].
        key: what the frequencies depend on beside the model; equal keys, equal rows.
    """

    tables: Tables
    key: int


@dataclass(frozen=True)
class RopeSource:
    """Makes the tables of a model.

    Attributes:
        rotary: Transformers' module, read for its rule alone: its buffers follow `.to(dtype)`.
        layer_type: the kind of layer that the tables are for, in models with several.
        head_dim: D.
    """

    rotary: Any
    layer_type: str | None
    head_dim: int

    @property
    def kind(self) -> str:
        kind = self.rotary.rope_type
        return kind if self.layer_type is None else kind[self.layer_type]

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the longest position."""
        return "dynamic" in self.kind or self.kind == "longrope"

    def tables(
        self, positions: int, longest: int, device: torch.device, old: Rope | None, spare: bool
    ) -> Rope:
        """The tables of a call.

        Args:
            positions: rows to have.
            longest: the call's largest position and 1, which some types scale by.
            old: tables of an earlier call, used again where they serve.
            spare: whether to make more rows than asked for, for calls to come.
        """
        key = self._key(longest)
        if old is not None and old.key == key and positions <= old.tables.cos.shape[0]:
            # What inference mode made cannot be saved for a backward pass.
            if old.tables.cos.is_inference() and not torch.is_inference_mode_enabled():
                return replace(old, tables=Tables(*(table.clone() for table in old.tables)))
            return old
        rows = -(-positions * 3 // (2 * ROUND)) * ROUND if spare else positions
        frequencies, scale = self.frequencies(longest)
        angles = torch.outer(
            torch.arange(rows, dtype=torch.float32, device=device), frequencies.to(device)
        )
        cos, sin = angles.cos() * scale, angles.sin() * scale
        still = self.head_dim // 2 - angles.shape[1]
        if still:
            cos = torch.cat([cos, cos.new_ones(rows, still)], 1)
            sin = torch.cat([sin, sin.new_zeros(rows, still)], 1)
        return Rope(Tables(cos, sin), key)

    def frequencies(self, longest: int = 1) -> tuple[Tensor, float]:
        """Radians a token, float32 [pairs], and what cos and sin are multiplied by."""
        layer = {} if self.layer_type is None else {"layer_type": self.layer_type}
        config, cpu = self.rotary.config, torch.device("cpu")
        with cpu:  # a model may be under construction on the meta device
            if self.kind == "default":
                made = self.rotary.compute_default_rope_parameters(config, device=cpu, **layer)
            else:
                make = ROPE_INIT_FUNCTIONS[self.kind]
                made = make(config, device=cpu, seq_len=longest, **layer)
        return made[0].to(torch.float32), float(made[1])

    def _key(self, longest: int) -> int:
        config = self.rotary.config
        if "dynamic" in self.kind:
            return max(longest, config.max_position_embeddings)
        if self.kind == "longrope":
            parameters = config.rope_parameters
            if self.layer_type is not None:
                parameters = parameters[self.layer_type]
            return int(longest > parameters["original_max_position_embeddings"])
        return 0


def rope_source(rotary: Any, layer_type: str | None, head_dim: int) -> RopeSource:
    """The source for layers of a type.

    Raises:
        InvalidInputError: rope that turns pairs which do not come out even.
    """
    kinds = rotary.rope_type
    source = RopeSource(rotary, layer_type if isinstance(kinds, dict) else None, head_dim)
    turned = 2 * source.frequencies()[0].shape[0]
    require(
        turned <= head_dim and (head_dim - turned) % 2 == 0,
        "apply_nsa",
        "rope must turn an even part of a head",
        f"{turned} of {head_dim} components",
        "such a model cannot be swapped",
    )
    return source


def arranged(x: Tensor, turned: int) -> Tensor:
    """Queries or keys [..., D] with the halves that rope pairs D/2 apart.

    Of D components the first `turned` are the ones that rope turns, its pairs turned/2 apart.
    Scores do not depend on the order, as long as queries and keys share it.
    """
    if turned == x.shape[-1]:
        return x
    half, still = turned // 2, (x.shape[-1] - turned) // 2
    first, second, rest, last = x.split([half, half, still, still], -1)
    return torch.cat([first, rest, second, last], -1)
