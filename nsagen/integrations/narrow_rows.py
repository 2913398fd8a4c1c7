"""Keys, values or windows of a batch in one byte an element. Needs PyTorch alone: exported packages
have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        return self.numbers.to(dtype) * self.scale.to(dtype)[..., None]

    def taken(self, index: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The values of some rows, by an index of the first three dimensions."""
        rows = self.numbers.view(torch.int8)[index].view(self.numbers.dtype)
        return rows.to(dtype) * self.scale[index].to(dtype)[..., None]


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
