"""Rope tables for any rope type of Transformers, from the model's own frequencies.

A table has a row per position and a column per pair of a head's components. It includes what a type
(yarn, longrope, dynamic, llama3, linear) does to frequencies and magnitudes. If rope rotates only a
part of a head, the other pairs have an angle of 0, and `arranged` brings queries and keys into the
order of the tables' pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nsagen.model.checks import require
from nsagen.model.rope import Tables

ROUND = 256
"""Tables of growing caches have a multiple of this many rows."""


@dataclass(frozen=True)
class Rope:
    """The tables of one call.

    Attributes:
        tables: cos and sin, float32 [P, D/2].
        key: tables of one model with equal keys have equal rows.
    """

    tables: Tables
    key: int


@dataclass(frozen=True, eq=False)
class Checked:
    """A model's own frequencies, as they were when they were compared with the config's.

    Attributes:
        held: the tensor in the model's rope module.
        version: of its contents.
        factor: of cos and sin.
    """

    held: Tensor
    version: int
    factor: float

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Checked)
            and self.held is other.held
            and (self.version, self.factor) == (other.version, other.factor)
        )


class Roped(NamedTuple):
    """What a model's own rope module returns, so that NSA, which has tables of its own, can tell
    when a hook or another module replaced it."""

    cos: Tensor
    sin: Tensor


def mark_rope(module: Any, args: Any, output: Any) -> Roped:
    """A forward hook of a model's rope module."""
    return Roped(*output)


@dataclass(frozen=True)
class RopeSource:
    """Makes the tables of a model.

    Attributes:
        kind: the rope type.
        config: the model's.
        layer_type: the kind of layer that the tables are for, in models with several kinds.
        head_dim: D.
        turned: components of a head that rope rotates.
        fixed: for types with one or two sets of frequencies, these sets by key: radians per token
            of each pair, and the factor of cos and sin. Transformers' own buffers can't be used:
            `.to(dtype)` rounds them.
    """

    kind: str
    config: Any
    layer_type: str | None
    head_dim: int
    turned: int = 0
    fixed: tuple[tuple[tuple[float, ...], float], ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the largest position."""
        return "dynamic" in self.kind or self.kind == "longrope"

    def tables(
        self, positions: int, longest: int, device: torch.device, old: Rope | None, spare: bool
    ) -> Rope:
        """The tables of a call.

        Args:
            positions: rows that are needed.
            longest: the call's largest position plus 1; some types scale by it.
            old: tables of an earlier call, reused if they fit.
            spare: whether to make more rows than needed, for later calls.
        """
        key = self._key(longest)
        if old is not None and old.key == key and positions <= old.tables.cos.shape[0]:
            # Autograd cannot save tensors made in inference mode.
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
        """Radians per token of each pair, and the factor of cos and sin."""
        with torch.device("cpu"):  # a model may be under construction on the meta device
            layer = {} if self.layer_type is None else {"layer_type": self.layer_type}
            make = ROPE_INIT_FUNCTIONS[self.kind]
            made = make(self.config, device=torch.device("cpu"), seq_len=longest, **layer)
        return tuple(made[0].to(torch.float32).tolist()), float(made[1])

    @property
    def _prefix(self) -> str:
        """What the names of a rope module's attributes begin with."""
        return "" if self.layer_type is None else f"{self.layer_type}_"

    def checked(self, rotary: Any) -> Checked | None:
        """A model's frequencies and their version; None if writes to them can't be told."""
        held = getattr(rotary, f"{self._prefix}inv_freq", None)
        if not isinstance(held, Tensor) or held.is_inference():
            return None
        factor = getattr(rotary, f"{self._prefix}attention_scaling", 1.0)
        return Checked(held, held._version, float(factor))

    def is_that_of(self, rotary: Any) -> Tensor | None:
        """Whether a model's rope module has these frequencies, rounded or not, and their factor.

        Returns:
            bool []; None where the module is another or its frequencies are elsewhere.
        """
        prefix = self._prefix
        held = getattr(rotary, f"{prefix}inv_freq", None)
        if not isinstance(held, Tensor) or held.is_meta:
            return None
        sets = self.fixed
        if not sets:
            longest = getattr(rotary, f"{prefix}max_seq_len_cached", rotary.max_seq_len_cached)
            sets = (self.frequencies(max(int(longest), self.config.max_position_embeddings)),)
        pairs, factors = zip(*sets, strict=True)
        expected = torch.tensor(pairs, dtype=torch.float32, device=held.device)
        x = held.detach().to(torch.float32)
        if x.shape != expected.shape[1:]:
            return torch.zeros((), dtype=torch.bool, device=held.device)
        off = (x - expected).abs()
        # Rounded, as `.to(dtype)` leaves them, or of a device whose powers differ in the last bits.
        rounded = (x == x.to(torch.bfloat16)) | (x == x.to(torch.float16))
        near = off <= 1e-5 * expected
        close = rounded & (off <= 2**-7 * expected + 1e-7)
        factor = getattr(rotary, f"{prefix}attention_scaling", factors[0])
        return (near | close).all(1).any() & (abs(float(factor) - factors[0]) <= 1e-6)

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
        InvalidInputError: rope that rotates an odd part of a head.
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
        "rope must rotate an even part of a head",
        f"{turned} of {head_dim} components",
        "such a model cannot be swapped",
    )
    return replace(source, turned=turned, fixed=fixed)


def arranged(x: Tensor, turned: int) -> Tensor:
    """Queries or keys [..., D], reordered so that rope's pairs lie D/2 apart.

    Rope rotates the first `turned` of D components, in pairs turned/2 apart. Scores do not depend
    on the order, if queries and keys share it.
    """
    if turned == x.shape[-1]:
        return x
    half, still = turned // 2, (x.shape[-1] - turned) // 2
    first, second, rest, last = x.split([half, half, still, still], -1)
    return torch.cat([first, rest, second, last], -1)
