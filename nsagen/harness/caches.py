"""Random inputs of decoding steps: rows whose caches hold NaN wherever a row must not read."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.harness.base import poisoned
from nsagen.workload import Workload


class RandomCaches:
    """Reproducible tensors of a workload's dtype; on the device "meta" only their shapes."""

    def __init__(self, workload: Workload, device: torch.device | str, seed: int) -> None:
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.device = torch.device(device)
        meta = self.device.type == "meta"
        self.generator = None if meta else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.to(self.dtype)

    def slots(self, rows: int) -> Tensor:
        """int32 [rows] on the CPU: a slot of rows + 1 for each row, out of order."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randperm(rows + 1, generator=generator)[:rows].to(torch.int32)

    def cache(self, slots: Tensor, lengths: list[int], *shape: int) -> Tensor:
        """[len(slots) + 1, *shape]: NaN but the first lengths[row] entries of a row's slot."""
        cache = poisoned((len(slots) + 1, *shape), self.dtype, self.device)
        for slot, length in zip(slots.tolist(), lengths, strict=True):
            cache[slot, :length] = self.normal(length, *shape[1:])
        return cache
