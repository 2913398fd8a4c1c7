"""`NativeSparseAttention` in the place of an attention module of Transformers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsagen.errors import InvalidInputError
from nsagen.integrations.transformers_cache import NSALayer, layer_of
from nsagen.model.cache import PrefillRows
from nsagen.model.nsa import NativeSparseAttention
from nsagen.model.packing import Packed


@dataclass(frozen=True)
class Layout:
    """How a padded batch [B, T] packs into [N]; made once a forward, shared by all layers.

    Attributes:
        packed: the packed batch.
        rows: int64 [N], each packed token's place in the flattened batch; None: all, in order.
        lengths: tokens of each row, on the host; None where only the device knows them.
    """

    packed: Packed
    rows: Tensor | None
    lengths: tuple[int, ...] | None

    @classmethod
    def of(cls, batch: int, tokens: int, device: torch.device, mask: Tensor | None) -> Layout:
        """From the padding mask [B, T] (True or nonzero: a token), or None for no padding."""
        if mask is None:
            lengths = (tokens,) * batch
            ends = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
            return cls(Packed.of(ends, batch * tokens, lengths), None, lengths)
        real = mask[:, -tokens:] != 0
        rows = real.flatten().nonzero().squeeze(1)
        counts = real.sum(1)
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        lengths = tuple(counts.tolist())
        return cls(Packed.of(ends, rows.shape[0], lengths), rows, lengths)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to [N, hidden]."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """[N, hidden] to [B, T, hidden], 0 at padding."""
        if self.rows is None:
            return packed.view_as(like)
        flat = packed.new_zeros(like.shape).flatten(0, 1)
        return flat.index_copy(0, self.rows, packed).view_as(like)


class Layouts:
    """The layout of the forward in progress: all layers see the same mask."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._layout: Layout | None = None

    def of(self, x: Tensor, mask: Tensor | None) -> Layout:
        """The layout of x [B, T, hidden] under a padding mask."""
        batch, tokens, device = x.shape[0], x.shape[1], x.device
        if mask is None:
            return Layout.of(batch, tokens, device, None)
        if mask.dim() != 2:
            raise InvalidInputError(
                "apply_nsa: attention_mask must be [batch, tokens], 1 for a token and 0 for "
                f"padding; got {list(mask.shape)}; NSA chooses what a token sees itself"
            )
        known = self._key
        if known is not None and known[0]() is mask and known[1:] == (mask._version, tokens):
            assert self._layout is not None
            return self._layout
        self._layout = Layout.of(batch, tokens, device, mask)
        self._key = (weakref.ref(mask), mask._version, tokens)
        return self._layout


class TransformersNSA(NativeSparseAttention):
    """Takes what an attention module of Llama, Mistral or Qwen3 takes.

    Its q_proj, k_proj, v_proj, o_proj and, for Qwen3, q_norm and k_norm are the replaced
    module's own; see `nsagen.integrations.initial` for its other parameters.
    """

    q_norm: nn.Module | None
    k_norm: nn.Module | None
    layer_idx: int
    layouts: Layouts

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend within each row of a batch.

        Args:
            hidden_states: [B, T, hidden].
            position_embeddings: not used: rope here has float32 tables in any dtype.
            attention_mask: [B, T or more], 0 at padding, or None.
            cache: Transformers' `Cache`, called `past_key_values` in its older versions.
            cu_seq_lens_q: int32 [sequences + 1], for sequences packed into one row.

        Returns:
            [B, T, hidden], and None for the attention weights, which NSA never forms.
        """
        x, cache = hidden_states, cache if cache is not None else past_key_values
        if cu_seq_lens_q is not None:
            if cache is not None or x.shape[0] != 1:
                raise InvalidInputError(
                    "apply_nsa: packed sequences must be one row without a cache; got "
                    f"{x.shape[0]} rows, {'no' if cache is None else 'a'} cache; use_cache=False"
                )
            return super().forward(x[0], cu_seq_lens_q.to(torch.int32))[None], None
        layer = None
        if cache is not None:
            layer = layer_of(cache, self.layer_idx, self.kernel_size, self.kernel_stride)
            if layer.seen:
                return self._continue(x, layer), None
        layout = self.layouts.of(x, attention_mask)
        inputs = layout.pack(x)
        if layer is None:
            out = super().forward(inputs, layout.packed.cu_seqlens, layout.packed)
        else:
            out = self._prefill(inputs, layout, layer, x)
        return layout.unpack(out, x), None

    def _prefill(self, inputs: Tensor, layout: Layout, layer: NSALayer, x: Tensor) -> Tensor:
        lengths = layout.lengths
        assert lengths is not None
        batch, tokens = x.shape[:2]
        store = layer.reserve(batch, tokens, self._key_like(x))
        slots = torch.arange(batch, device=x.device)
        rows = PrefillRows.of(layout.packed, slots, lengths, self.kernel_size, self.kernel_stride)
        out = self.prefill(inputs, layout.packed, rows, store)
        layer.lengths = layout.packed.cu_seqlens.diff()
        layer.seen = tokens
        return out

    def _continue(self, x: Tensor, layer: NSALayer) -> Tensor:
        """New tokens of each row behind cached ones, one after another. [B, T, hidden]."""
        batch, tokens = x.shape[:2]
        store = layer.reserve(batch, layer.seen + tokens, self._key_like(x))
        slots = torch.arange(batch, dtype=torch.int32, device=x.device)
        outputs = []
        for token in range(tokens):
            outputs.append(self.decode(x[:, token], layer.lengths, slots, store))
            layer.lengths = layer.lengths + 1
        layer.seen += tokens
        return torch.stack(outputs, 1)

    def _key_like(self, x: Tensor) -> Tensor:
        return x.new_empty(self.num_kv_heads, self.head_dim)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
