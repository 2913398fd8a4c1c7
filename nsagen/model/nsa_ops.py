"""What Native Sparse Attention does with its parameters, wherever these come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsagen import ops
from nsagen.model.compression import (
    Holder,
    Weights,
    holder_of,
    in_dtype,
    mean_weights,
    weights_of,
)
from nsagen.model.gate import Gate, in_columns
from nsagen.model.heads import KV, PROJECTIONS, Branches, Heads
from nsagen.model.layer_cache import NSALayerCache
from nsagen.model.packing import Packed
from nsagen.model.rope import RotaryEmbedding
from nsagen.model.sparsity import Sparsity
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.layout import positions_in_sequence
from nsagen.ops.separate import SeparateKV


class NSAOps(nn.Module):
    """The ops on the parameters of `NativeSparseAttention`, which documents them."""

    sparsity: Sparsity
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    softmax_scale: float
    dispatcher: Any
    rotary_emb: RotaryEmbedding
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    gate: Gate
    compress_key: Holder
    compress_value: Holder
    intra_block_pe: nn.Parameter | None
    intra_block_pe_value: nn.Parameter | None

    def add_compression(self, generator: torch.Generator | None = None, **where: Any) -> None:
        """Make the parameters of compression, as they start.

        Without the compressed branch keys compress for selection alone, which has no gradient:
        then these are constants.

        Args:
            where: their device and dtype; PyTorch's own by default.
        """
        s, shape = self.sparsity, (self.num_kv_heads, self.sparsity.kernel_size)
        hidden = s.mlp_units(self.head_dim)
        k_dim, v_dim = self.head_dim, self.v_head_dim
        w_k = mean_weights(s.key_type, *shape, k_dim, hidden, generator)
        w_v = mean_weights(s.value_type, *shape, v_dim, hidden, generator)
        self.compress_key, self.compress_value = (holder_of(w, **where) for w in (w_k, w_v))
        self.intra_block_pe = self.intra_block_pe_value = None
        if s.needs_windows:
            self.intra_block_pe = nn.Parameter(torch.zeros(*shape, k_dim, **where))
        if s.embeds_values:
            self.intra_block_pe_value = nn.Parameter(torch.zeros(*shape, v_dim, **where))
        if "compressed" not in s.on:
            for made in (self.compress_key, self.intra_block_pe):
                if made is not None:
                    made.requires_grad_(False)

    def projections(self) -> list[nn.Linear]:
        """Those of queries, then of keys and values of each branch that has its own."""
        layers = [self.q_proj, self.k_proj, self.v_proj]
        for branch in self.sparsity.kv_branches[1:]:
            layers += [getattr(self, name) for name in PROJECTIONS[branch]]
        return layers

    def heads(self, x: Tensor) -> Heads:
        """Queries, keys and values of tokens [N, hidden_size]."""
        return self.split([layer(x) for layer in self.projections()])

    def split(self, projected: Sequence[Tensor]) -> Heads:
        """The heads in what each of `projections` made."""
        q, *rest = projected
        q, rows = q.unflatten(-1, (self.num_q_heads, -1)), (self.num_kv_heads, -1)
        pairs = [
            KV(self._key(k.unflatten(-1, rows)), v.unflatten(-1, rows))
            for k, v in zip(rest[::2], rest[1::2], strict=True)
        ]
        q = q if self.q_norm is None else self.q_norm(q)
        if len(pairs) == 1:
            return Heads(q, pairs[0], pairs[0], pairs[0])
        selected, compressed, *own = pairs
        return Heads(q, compressed, selected, own[0] if own else selected)

    def _key(self, k: Tensor) -> Tensor:
        return k if self.k_norm is None else self.k_norm(k)

    def gates(self, x: Tensor) -> Tensor:
        """[N, HQ, 3]: compressed, selected, sliding; 0 where a branch is off."""
        return self.gate_columns(self.gate(x).sigmoid())

    def gate_columns(self, gate: Tensor) -> Tensor:
        """`gates` from [N, HQ * branches that are on]."""
        return in_columns(gate.unflatten(-1, (self.num_q_heads, -1)), self.sparsity.on)

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        tables = (self.rotary_emb.cos, self.rotary_emb.sin)
        return ops.rope(x, *tables, positions, dispatcher=self.dispatcher)

    def turned(self, heads: Heads, positions: Tensor) -> tuple[Tensor, KV, KV]:
        """q and the selected and the sliding branch's keys after rope."""
        q, selected = self.rope(heads.q, positions), heads.selected
        selected = KV(self.rope(selected.k, positions), selected.v)
        if heads.sliding is heads.selected:
            return q, selected, selected
        return q, selected, KV(self.rope(heads.sliding.k, positions), heads.sliding.v)

    def compress(self, tokens: KV, cu_seqlens: Tensor) -> tuple[KV, Tensor]:
        """Windows of keys and values before rope, and where each sequence's start."""
        (k, v), s = tokens, self.sparsity
        # Under autocast the tokens have another dtype than the parameters.
        w_k, w_v, pe, pe_v = (in_dtype(weights, k.dtype) for weights in self._compression())
        sizes = {"dispatcher": self.dispatcher, **s.window_sizes}
        ck, ends = ops.compress(k, w_k, pe, cu_seqlens, compress_type=s.key_type, **sizes)
        cv, _ = ops.compress(v, w_v, pe_v, cu_seqlens, compress_type=s.value_type, **sizes)
        return KV(ck, cv), ends

    def _compression(self) -> tuple[Weights, Weights, Tensor | None, Tensor | None]:
        """Weights and position embeddings of keys and of values."""
        w_k, w_v = weights_of(self.compress_key), weights_of(self.compress_value)
        return w_k, w_v, self.intra_block_pe, self.intra_block_pe_value

    def branches(self, heads: Heads, packed: Packed) -> Branches:
        """What the branches read of whole sequences."""
        q, selected, sliding = self.turned(heads, packed.positions)
        windows, ends = None, packed.cu_seqlens
        if self.sparsity.needs_windows:
            (ck, cv), ends = self.compress(heads.compressed, packed.cu_seqlens)
            starts = positions_in_sequence(ends, ck.shape[0]) * self.sparsity.kernel_stride
            windows = KV(self.rope(ck, starts), cv)
        return Branches(q, windows, selected, sliding, packed.cu_seqlens, ends)

    def attend(self, b: Branches, gate: Tensor) -> Tensor:
        """The gated sum of the branches that are on: [N, HQ * Dv]."""
        s = self.sparsity
        o = attend_branches(
            *(b.q, b.windows, b.selected, b.sliding, gate),
            cu_seqlens=b.cu_seqlens,
            window_cu_seqlens=b.window_cu_seqlens,
            **s.selection_sizes,
            window_size=s.window_size,
            branches=s.on,
            softmax_scale=self.softmax_scale,
            q_start=b.q_start,
            cu_seqlens_k=b.cu_seqlens_k,
            dispatcher=self.dispatcher,
        )
        return o.flatten(1)

    def decode_heads(
        self, heads: Heads, gate: Tensor, positions: Tensor, slots: Tensor, cache: NSALayerCache
    ) -> Tensor:
        """Append one token of each sequence to the cache and attend with it: [R, HQ * Dv]."""
        rows, s = (positions, slots), self.sparsity
        common = {"block_table": cache.block_table, "dispatcher": self.dispatcher}
        w_k, w_v, pe, pe_v = self._compression()
        q = ops.cache_append(
            *(heads.q, heads.selected.k, heads.selected.v),
            *(self.rotary_emb.cos, self.rotary_emb.sin),
            *(w_k, w_v, pe),
            *rows,
            *(cache.k, cache.v, cache.ck, cache.cv, cache.k_raw),
            compress_type=s.key_type,
            v_compress_type=s.value_type,
            pe_v=pe_v,
            separate=_separate(heads, cache),
            **s.window_sizes,
            **common,
        )
        common["softmax_scale"] = self.softmax_scale
        if s.needs_windows:
            o_compressed, topk_idx = ops.compressed_attention_decode(
                *(q, cache.ck, cache.cv), *rows, **s.selection_sizes, **common
            )
        else:  # neither is read
            o_compressed = q.new_zeros(*q.shape[:2], cache.v.shape[-1])
            topk_idx = positions.new_full((self.num_kv_heads, q.shape[0], 1), -1)
        o = ops.native_sparse_attention_decode(
            *(q, cache.k, cache.v, topk_idx),
            *rows,
            *(o_compressed, gate),
            block_size=s.block_size,
            window_size=s.window_size,
            branches=s.on,
            k_window_cache=cache.k_window,
            v_window_cache=cache.v_window,
            **common,
        )
        return o.flatten(1)


def _separate(heads: Heads, cache: NSALayerCache) -> SeparateKV | None:
    """What `cache_append` takes where the compressed branch has keys and values of its own."""
    if cache.v_raw is None:
        return None
    _, sliding = cache.of_tokens
    return SeparateKV(*heads.compressed, *heads.sliding, cache.v_raw, *sliding)
