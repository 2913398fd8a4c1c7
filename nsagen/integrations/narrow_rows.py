"""Keys, values or windows of a batch in one byte an element. Needs PyTorch alone: exported packages
have it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nsagen.ops.load_rows import load_rows


@dataclass(frozen=True)
class NarrowRows:
    """What `nsagen.ops.reference.quantize` makes of heads' rows.

    Attributes:
        numbers: [B, H, T, D], of torch.float8_e4m3fn or torch.int8.
        scale: float32 [B, H, T].
    """

    numbers: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def requires_grad(self) -> bool:
        """False: what is stored has no gradient."""
        return False

    @property
    def as_cache(self) -> tuple[Tensor, Tensor]:
        """As ops take a cache and its scales: [B, T, H, D] and [B, T, H]."""
        return self.numbers.transpose(1, 2), self.scale.transpose(1, 2)

    def first(self, count: int) -> NarrowRows:
        """Those of the first tokens or windows."""
        return NarrowRows(self.numbers[:, :, :count], self.scale[:, :, :count])

    def wide(self, dtype: torch.dtype) -> Tensor:
        """Their values, exact in bfloat16 and wider, as scales are powers of two."""
        batch, _, tokens, _ = self.shape
        together = NarrowRows(self.numbers.flatten(0, 1)[None], self.scale.flatten(0, 1)[None])
        inference = torch.is_inference_mode_enabled()
        rows = together.loaded(places_of(1, 0, tokens, self.numbers.device, inference), dtype)
        return rows.transpose(0, 1).unflatten(0, (batch, -1))

    def loaded(self, places: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """[N, H, D]: the values at int32 positions and rows of the batch, in one pass."""
        return load_rows(*self.as_cache, *places, dtype)

    def taken(self, index: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The values of some rows, by an index of the first three dimensions."""
        rows = self.numbers.view(torch.int8)[index].view(self.numbers.dtype)
        return rows.to(dtype) * self.scale[index].to(dtype)[..., None]


@functools.lru_cache(maxsize=8)
def places_of(
    batch: int, first: int, count: int, device: torch.device, inference: bool
) -> tuple[Tensor, Tensor]:
    """int32 [batch * count], positions and slots of tokens: the same for all layers."""
    positions = torch.arange(first, first + count, dtype=torch.int32, device=device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    return positions.repeat(batch), slots.repeat_interleave(count)


Rows = Tensor | NarrowRows
"""[B, H, T, D]."""


def widened(x: Rows, dtype: torch.dtype) -> Tensor:
    """The rows' values; a tensor as it is."""
    return x.wide(dtype) if isinstance(x, NarrowRows) else x


def taken(x: Rows, index: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The values of some rows, by an index of the first three dimensions."""
    return x.taken(index, dtype) if isinstance(x, NarrowRows) else x[index]


def cache_and_scale(x: Rows) -> tuple[Tensor, Tensor | None]:
    """As ops take them: [B, T, H, D], and [B, T, H] or None."""
    return x.as_cache if isinstance(x, NarrowRows) else (x.transpose(1, 2), None)
