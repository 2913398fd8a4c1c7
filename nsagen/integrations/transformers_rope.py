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
        kind: the rope type.
        config: the model's.
        layer_type: the kind of layer that the tables are for, in models with several.
        head_dim: D.
        turned: components of a head that rope turns.
        fixed: for types whose frequencies are one of few sets, these sets by their key: radians a
            token of each pair, and what cos and sin are multiplied by. Not Transformers' buffers,
            which follow `.to(dtype)`.
    """

    kind: str
    config: Any
    layer_type: str | None
    head_dim: int
    turned: int = 0
    fixed: tuple[tuple[tuple[float, ...], float], ...] = ()

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
            compiled = torch.compiler.is_compiling()
            if (
                not compiled
                and old.tables.cos.is_inference()
                and not torch.is_inference_mode_enabled()
            ):
                return replace(old, tables=Tables(*(table.clone() for table in old.tables)))
            return old
        rows = -(-positions * 3 // (2 * ROUND)) * ROUND if spare else positions
        pairs, scale = self.fixed[key] if self.fixed else self.frequencies(longest)
        frequencies = torch.tensor(pairs, dtype=torch.float32, device=device)
        angles = torch.outer(torch.arange(rows, dtype=torch.float32, device=device), frequencies)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        still = self.head_dim // 2 - angles.shape[1]
        if still:
            cos = torch.cat([cos, cos.new_ones(rows, still)], 1)
            sin = torch.cat([sin, sin.new_zeros(rows, still)], 1)
        return Rope(Tables(cos, sin), key)

    def frequencies(self, longest: int = 1) -> tuple[tuple[float, ...], float]:
        """Radians a token of each pair, and what cos and sin are multiplied by."""
        with torch.device("cpu"):  # a model may be under construction on the meta device
            layer = {} if self.layer_type is None else {"layer_type": self.layer_type}
            make = ROPE_INIT_FUNCTIONS[self.kind]
            made = make(self.config, device=torch.device("cpu"), seq_len=longest, **layer)
        return tuple(made[0].to(torch.float32).tolist()), float(made[1])

    def _key(self, longest: int) -> int:
        if "dynamic" in self.kind:
            return max(longest, self.config.max_position_embeddings)
        return int(self.kind == "longrope" and longest > self._original)

    @property
    def _original(self) -> int:
        parameters = self.config.rope_parameters
        parameters = parameters if self.layer_type is None else parameters[self.layer_type]
        return parameters["original_max_position_embeddings"]


def rope_source(rotary: Any, layer_type: str | None, head_dim: int) -> RopeSource:
    """The source for layers of a type.

    Args:
        rotary: Transformers' module, read for its rule.

    Raises:
        InvalidInputError: rope that turns pairs which do not come out even.
    """
    kinds: Any = rotary.rope_type
    config = rotary.config
    layer_type = layer_type if isinstance(kinds, dict) else None
    kind: Any = kinds if layer_type is None else kinds[layer_type]
    source = RopeSource(kind, config, layer_type, head_dim)
    if kind == "default":
        with torch.device("cpu"):
            layer = {} if layer_type is None else {"layer_type": layer_type}
            made = rotary.compute_default_rope_parameters(config, device="cpu", **layer)
        fixed = ((tuple(made[0].tolist()), float(made[1])),)
    elif kind == "longrope":
        fixed = (source.frequencies(), source.frequencies(source._original + 1))
    else:
        fixed = () if "dynamic" in kind else (source.frequencies(),)
    turned = 2 * len(fixed[0][0] if fixed else source.frequencies()[0])
    require(
        turned <= head_dim and (head_dim - turned) % 2 == 0,
        "apply_nsa",
        "rope must turn an even part of a head",
        f"{turned} of {head_dim} components",
        "such a model cannot be swapped",
    )
    return replace(source, turned=turned, fixed=fixed)


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
