"""How the padded batches of Transformers pack into sequences one after another."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.core.errors import InvalidInputError
from nsagen.ops.layout import compressed_cu_seqlens, positions_in_sequence


@dataclass(frozen=True)
class Windows:
    """The compression windows of a packed batch.

    Attributes:
        row: int64 [sum M], the row of each window.
        index: int64 [sum M], its index within the row.
    """

    row: Tensor
    index: Tensor


@dataclass(frozen=True)
class Layout:
    """A padded batch [B, T], packed into [N]. Made once a forward and shared by all layers.

    Attributes:
        batch, tokens: B and T.
        lengths: tokens of each row, without padding.
        cu_seqlens: int32 [B + 1], where each row starts when packed.
        row: int64 [N], the row of each packed token.
        positions: int32 [N], its position in the row, padding not counted.
        places: int64 [N], its place in the flattened batch; None: all tokens, in order.
    """

    batch: int
    tokens: int
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    row: Tensor
    positions: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, batch: int, tokens: int, device: torch.device, mask: Tensor | None) -> Layout:
        """From the padding mask [B, >= T], not 0 at tokens; or None, which no device waits for."""
        if mask is None:
            ends = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
            return cls._packed(tokens, (tokens,) * batch, ends, None)
        real = mask[:, -tokens:] != 0
        counts = real.sum(1)
        ends = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        places = real.flatten().nonzero().squeeze(1)
        return cls._packed(tokens, counts.tolist(), ends, places)

    @classmethod
    def _packed(
        cls, tokens: int, lengths: Sequence[int], cu_seqlens: Tensor, places: Tensor | None
    ) -> Layout:
        count = sum(lengths)
        packed = torch.arange(count, dtype=torch.int32, device=cu_seqlens.device)
        row = torch.searchsorted(cu_seqlens[1:], packed, right=True)
        positions = positions_in_sequence(cu_seqlens, count)
        return cls(len(lengths), tokens, tuple(lengths), cu_seqlens, row, positions, places)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to [N, hidden]."""
        flat = x.flatten(0, 1)
        return flat if self.places is None else flat[self.places]

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, hidden] to [B, T, hidden], 0 at padding."""
        shape = (self.batch, self.tokens, packed.shape[-1])
        if self.places is None:
            return packed.view(shape)
        flat = packed.new_zeros(shape).flatten(0, 1)
        return flat.index_copy(0, self.places, packed).view(shape)

    def windows(self, kernel_size: int, kernel_stride: int) -> Windows:
        """The windows of all rows, one after another."""
        ends = compressed_cu_seqlens(self.cu_seqlens, kernel_size, kernel_stride)
        total = sum(max(0, (n - kernel_size) // kernel_stride + 1) for n in self.lengths)
        every = torch.arange(total, dtype=torch.int32, device=ends.device)
        row = torch.searchsorted(ends[1:], every, right=True)
        return Windows(row, (every - ends[row]).to(torch.int64))

    def last_tokens(self, count: int) -> Tensor:
        """int64 [B, count]: at j, the packed row of the last token t with t % count == j.

        A row with no such token has some other token there, which nothing may read.
        """
        last = self.cu_seqlens.diff()[:, None] - 1
        back = torch.arange(count, dtype=torch.int32, device=last.device)
        token = (last - (last - back) % count).clamp(min=0) + self.cu_seqlens[:-1, None]
        return token.clamp(max=max(0, sum(self.lengths) - 1)).to(torch.int64)


class Layouts:
    """The layout of the forward in progress: all layers are given the same mask."""

    def __init__(self) -> None:
        self._known: tuple[Any, ...] | None = None
        self._layout: Layout | None = None

    def of(self, x: Tensor, mask: Tensor | None) -> Layout:
        """The layout of x [B, T, hidden] under a padding mask.

        Raises:
            InvalidInputError: the mask is none of padding.
        """
        batch, tokens = x.shape[:2]
        if mask is None:
            return Layout.of(batch, tokens, x.device, None)
        if mask.dim() != 2:
            raise InvalidInputError(
                "apply_nsa: attention_mask must be [batch, tokens], 1 for a token and 0 for "
                f"padding; got {list(mask.shape)}; NSA chooses what a token sees itself"
            )
        if self._known is not None and self._layout is not None:
            known, *rest = self._known
            if known() is mask and rest == [mask._version, tokens]:
                return self._layout
        self._known = (weakref.ref(mask), mask._version, tokens)
        self._layout = Layout.of(batch, tokens, x.device, mask)
        return self._layout
