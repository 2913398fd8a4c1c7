"""Dense causal attention, the module that `NativeSparseAttention` replaces."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsagen.model.cache import KVLayerCache, PrefillRows
from nsagen.model.layers import linear
from nsagen.model.packing import Packed
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
        q, k, v = self._qkv(x, packed.positions)
        return self._attend(q, k, v, packed)

    def prefill(self, x: Tensor, packed: Packed, rows: PrefillRows, cache: KVLayerCache) -> Tensor:
        """`forward` that also writes the prompts into the cache."""
        q, k, v = self._qkv(x, packed.positions)
        cache.fill(rows, k, v)
        return self._attend(q, k, v, packed)

    def decode(self, x: Tensor, positions: Tensor, slots: Tensor, cache: KVLayerCache) -> Tensor:
        """Attend with one new token of each sequence, after appending it to the cache.

        x [R, hidden_size], positions int32 [R], slots int32 [R]; returns [R, hidden_size].
        """
        q, k, v = self._qkv(x, positions)
        slot = slots.to(torch.int64)
        cache.k[slot, positions.to(torch.int64)] = k
        cache.v[slot, positions.to(torch.int64)] = v
        keys = torch.arange(cache.k.shape[1], device=x.device)
        visible = keys <= positions[:, None]
        o = F.scaled_dot_product_attention(
            q[:, :, None],
            cache.k[slot].transpose(1, 2),
            cache.v[slot].transpose(1, 2),
            attn_mask=visible[:, None, None],
            enable_gqa=True,
        )
        return self.o_proj(o.flatten(1))

    def _qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, HQ, D] and k [N, HK, D] after rope, v [N, HK, D]."""
        cos, sin = self.rotary_emb.cos, self.rotary_emb.sin
        q = self.q_proj(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return reference.rope(q, cos, sin, positions), reference.rope(k, cos, sin, positions), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        assert packed.lengths is not None
        outputs = [q[:0]]
        start = 0
        for length, run in itertools.groupby(packed.lengths):  # one call for equal neighbours
            batch = len(list(run))
            end = start + batch * length
            if length > 0:
                some_q, some_k, some_v = (
                    t[start:end].unflatten(0, (batch, length)).transpose(1, 2) for t in (q, k, v)
                )
                o = F.scaled_dot_product_attention(
                    some_q, some_k, some_v, is_causal=True, enable_gqa=True
                )
                outputs.append(o.transpose(1, 2).flatten(0, 1))
            start = end
        return self.o_proj(torch.cat(outputs).flatten(1))
