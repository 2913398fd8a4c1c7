"""Dense causal attention, the module that `NativeSparseAttention` replaces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsagen.model.cache import KVLayerCache
from nsagen.model.layers import RMSNorm, joined_weight, linear, project
from nsagen.model.packing import Packed
from nsagen.model.prefill import PrefillRows
from nsagen.model.rope import RotaryEmbedding
from nsagen.ops import reference


class SelfAttention(nn.Module):
    """Dense causal attention over a packed batch, in PyTorch alone.

    Args:
        hidden_size: width of the input and output.
        num_q_heads, num_kv_heads, head_dim: HQ, HK and D.
        rope: tables shared by all layers.
        initializer_range: standard deviation of the initial projections.
        generator: source of the initial weights; None for PyTorch's own.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope: RotaryEmbedding,
        initializer_range: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.rotary_emb = rope
        q_dim, kv_dim = num_q_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = linear(hidden_size, q_dim, initializer_range, generator)
        self.k_proj = linear(hidden_size, kv_dim, initializer_range, generator)
        self.v_proj = linear(hidden_size, kv_dim, initializer_range, generator)
        self.o_proj = linear(q_dim, hidden_size, initializer_range, generator)

    def forward(self, x: Tensor, cu_seqlens: Tensor, packed: Packed | None = None) -> Tensor:
        """Attend within each sequence of a packed batch.

        Args:
            x: [N, hidden_size].
            cu_seqlens: int32 [batch+1], where each sequence starts; the last entry is N.
            packed: the layout with its lengths, where the caller has it already.

        Returns:
            [N, hidden_size], in x's dtype.
        """
        packed = packed or Packed.of(cu_seqlens, x.shape[0], cu_seqlens.diff().tolist())
        assert packed.lengths is not None
        q, k, v = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), packed.positions)
        return self.o_proj(self._attend(q, k, v, packed.lengths, packed.lengths))

    def prefill(
        self, x: Tensor, rows: PrefillRows, cache: KVLayerCache, norm: RMSNorm, residual: Tensor
    ) -> Tensor:
        """residual + attention of norm(x), over pieces of sequences; also fills the cache.

        x and residual [N, hidden_size]; returns the same shape.
        """
        q, k, v = self._fused_qkv(x, norm, rows.positions)
        cache.fill(rows, k, v)
        key_lengths = rows.lengths
        if rows.context is not None:
            k, v = rows.context.of(cache.k), rows.context.of(cache.v)
            key_lengths = rows.context.lengths
        o = self._attend(q, k, v, rows.lengths, key_lengths)
        return project(o, self.o_proj.weight, residual=residual)

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: KVLayerCache,
        norm: RMSNorm,
        residual: Tensor,
    ) -> Tensor:
        """residual + attention of one new token of each sequence, after appending it to the cache.

        x and residual [R, hidden_size], positions int32 [R] (-1: an idle row), slots int32 [R];
        returns [R, hidden_size].
        """
        q, k, v = self._fused_qkv(x, norm, positions.clamp(min=0))
        # An idle row writes back what is there, so that a step never asks which rows are idle.
        index = (slots.to(torch.int64), positions.clamp(min=0).to(torch.int64))
        idle = (positions < 0)[:, None, None]
        cache.k[index] = torch.where(idle, cache.k[index], k)
        cache.v[index] = torch.where(idle, cache.v[index], v)
        keys = torch.arange(cache.k.shape[1], device=x.device)
        visible = keys <= positions.clamp(min=0)[:, None]
        o = F.scaled_dot_product_attention(
            q[:, :, None],
            cache.k[index[0]].transpose(1, 2),
            cache.v[index[0]].transpose(1, 2),
            attn_mask=visible[:, None, None],
            enable_gqa=True,
        )
        return project(o.flatten(1), self.o_proj.weight, residual=residual)

    def _fused_qkv(
        self, x: Tensor, norm: RMSNorm, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as `_heads` makes them, by one product; for inference."""
        y = project(x, joined_weight(self.q_proj, self.k_proj, self.v_proj), norm=norm)
        sizes = [layer.out_features for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = y.split(sizes, -1)
        return self._heads(q, k, v, positions)

    def _heads(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, HQ, D] and k [N, HK, D] after rope, v [N, HK, D]."""
        cos, sin = self.rotary_emb.cos, self.rotary_emb.sin
        q = q.unflatten(-1, (self.num_q_heads, self.head_dim))
        k, v = (t.unflatten(-1, (self.num_kv_heads, self.head_dim)) for t in (k, v))
        return reference.rope(q, cos, sin, positions), reference.rope(k, cos, sin, positions), v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
    ) -> Tensor:
        """[N, HQ * D]; each sequence's queries are the last ones of its tokens."""
        outputs = [q[:0]]
        q_start, k_start = 0, 0
        for (length, keys), run in itertools.groupby(zip(lengths, key_lengths, strict=True)):
            batch = len(list(run))  # neighbours of equal lengths: one call
            q_end, k_end = q_start + batch * length, k_start + batch * keys
            if length > 0:
                some_q = q[q_start:q_end].unflatten(0, (batch, length)).transpose(1, 2)
                some_k, some_v = (
                    t[k_start:k_end].unflatten(0, (batch, keys)).transpose(1, 2) for t in (k, v)
                )
                places = torch.arange(keys, device=q.device)
                o = F.scaled_dot_product_attention(
                    *(some_q, some_k, some_v),
                    attn_mask=None if length == keys else places <= places[-length:, None],
                    is_causal=length == keys,
                    enable_gqa=True,
                )
                outputs.append(o.transpose(1, 2).flatten(0, 1))
            q_start, k_start = q_end, k_end
        return torch.cat(outputs).flatten(1)
