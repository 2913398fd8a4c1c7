"""Dense causal attention, the module that `NativeSparseAttention` replaces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsagen.core.errors import InvalidInputError
from nsagen.model.cache import KVLayerCache
from nsagen.model.fused import JoinsWeights, own
from nsagen.model.layers import RMSNorm, linear, project
from nsagen.model.memory import require_memory
from nsagen.model.packing import Packed
from nsagen.model.prefill import CachedRows, DecodeRows
from nsagen.model.rope import RotaryEmbedding
from nsagen.ops import reference

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int]], Tensor]
"""q [N, HQ, D], k and v [R, HK, D], lengths of queries and of keys: [N, HQ, D]."""


@own
class SelfAttention(JoinsWeights):
    """Dense causal attention over a packed batch, in PyTorch alone.

    Args:
        hidden_size: width of the input and output.
        num_q_heads, num_kv_heads, head_dim: HQ, HK and D.
        rope: tables shared by all layers.
        initializer_range: standard deviation of the initial projections.
        generator: source of the initial weights; None for PyTorch's own.

    Attributes:
        attend: how packed sequences attend; `attend_causally` unless another function of its
            first five arguments is set, which single tokens behind a cache then refuse.
        head_ranks: processes that share the heads under tensor parallelism.
    """

    attend: Attend
    head_ranks = 1

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
        self.attend = attend_causally
        q_dim, kv_dim = num_q_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = linear(hidden_size, q_dim, initializer_range, generator)
        self.k_proj = linear(hidden_size, kv_dim, initializer_range, generator)
        self.v_proj = linear(hidden_size, kv_dim, initializer_range, generator)
        self.o_proj = linear(q_dim, hidden_size, initializer_range, generator)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        packed: Packed | CachedRows | None = None,
        cache: KVLayerCache | None = None,
    ) -> Tensor:
        """Attend within each sequence of a packed batch.

        Args:
            x: [N, hidden_size].
            cu_seqlens: int32 [batch+1], where each sequence starts; the last entry is N.
            packed: the layout with its lengths, if the caller already has it.
            cache: earlier tokens of the sequences, to which these are added; `packed` then says
                where. Without gradients.

        Returns:
            [N, hidden_size], in x's dtype.
        """
        if cache is not None:
            assert isinstance(packed, CachedRows)
            # Under autocast products have another dtype than the cache and the residual stream.
            q, k, v = (layer(x).to(x.dtype) for layer in self.joined_layers())
            return self.o_proj(self._behind(q, k, v, packed, cache))
        assert not isinstance(packed, CachedRows)
        if packed is None:  # called by itself, not by a model that has checked its weights
            require_memory("SelfAttention.forward", self, x)
            packed = Packed.of(cu_seqlens, x.shape[0], cu_seqlens.diff().tolist())
        assert packed.lengths is not None
        q, k, v = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), packed.positions)
        if packed.remote is not None:
            return self.o_proj(packed.remote.dense(self._attend, q, k, v, packed))
        return self.o_proj(self._attend(q, k, v, packed.lengths, packed.lengths))

    def joined_layers(self) -> list[nn.Linear]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def fused(
        self, x: Tensor, rows: CachedRows, cache: KVLayerCache, norm: RMSNorm, residual: Tensor
    ) -> Tensor:
        """residual + forward(norm(x)) with a cache, by two products around attention.

        x and residual [N, hidden_size]; returns the same shape.
        """
        y = project(x, self.joined_weight(), norm=norm)
        q, k, v = y.split([layer.out_features for layer in self.joined_layers()], -1)
        o = self._behind(q, k, v, rows, cache)
        return project(o, self.o_proj.weight, residual=residual)

    def _behind(
        self, q: Tensor, k: Tensor, v: Tensor, rows: CachedRows, cache: KVLayerCache
    ) -> Tensor:
        """Add tokens to the cache and attend with them: [N, HQ * D]."""
        if isinstance(rows, DecodeRows):
            return self._decode(q, k, v, rows, cache)
        q, k, v = self._heads(q, k, v, rows.positions)
        cache.fill(rows, k, v)
        key_lengths = rows.lengths
        if rows.context is not None:
            k, v = rows.context.of(cache.k), rows.context.of(cache.v)
            key_lengths = rows.context.lengths
        return self._attend(q, k, v, rows.lengths, key_lengths)

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, rows: DecodeRows, cache: KVLayerCache
    ) -> Tensor:
        if self.attend is not attend_causally:
            raise InvalidInputError(
                "SelfAttention: single tokens behind a cache need attend=attend_causally; "
                f"got {self.attend}; run whole sequences"
            )
        positions = rows.positions.clamp(min=0)
        q, k, v = self._heads(q, k, v, positions)
        # An idle row writes back what was there, so a step never asks which rows are idle.
        index = (rows.slots.to(torch.int64), positions.to(torch.int64))
        idle = (rows.positions < 0)[:, None, None]
        cache.k[index] = torch.where(idle, cache.k[index], k)
        cache.v[index] = torch.where(idle, cache.v[index], v)
        keys = torch.arange(cache.k.shape[1], device=q.device)
        visible = keys <= positions[:, None]
        # In place of what earlier sequences left behind the newest token, that token again: a mask
        # takes no NaN out.
        places = (index[0][:, None], torch.minimum(keys, positions[:, None]))
        o = F.scaled_dot_product_attention(
            q[:, :, None],
            cache.k[places].transpose(1, 2),
            cache.v[places].transpose(1, 2),
            attn_mask=visible[:, None, None],
            enable_gqa=True,
        )
        return o.flatten(1)

    def _heads(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, HQ, D] and k [N, HK, D] after rope, v [N, HK, D]."""
        cos, sin = self.rotary_emb.tables(q)
        q = q.unflatten(-1, (-1, self.head_dim))  # some of the heads under tensor parallelism
        k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (k, v))
        return reference.rope(q, cos, sin, positions), reference.rope(k, cos, sin, positions), v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
    ) -> Tensor:
        """[N, HQ * D]; see `attend_causally`."""
        return self.attend(q, k, v, lengths, key_lengths).flatten(1)


def attend_causally(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Attention of packed sequences to all of their tokens up to each query's own: [N, HQ, D].

    Args:
        q: [N, HQ, D]; k, v: [R, HK, D].
        lengths: queries of each sequence, the last ones of its tokens; key_lengths: its keys.
        scale: of the scores; 1/sqrt(D) by default.
    """
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
                scale=scale,
                enable_gqa=True,
            )
            outputs.append(o.transpose(1, 2).flatten(0, 1))
        q_start, k_start = q_end, k_end
    return torch.cat(outputs)
