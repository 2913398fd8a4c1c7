"""What Native Sparse Attention does with its parameters, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nsagen import ops
from nsagen.model.compression import Holder, Weights, holder_of, mean_weights, weights_of
from nsagen.model.gate import Gate, in_columns
from nsagen.model.heads import KV, PROJECTIONS, Branches, Heads
from nsagen.model.layer_cache import NSALayerCache
from nsagen.model.packing import Packed
from nsagen.model.prefill import PrefillRows
from nsagen.model.rope import Tables
from nsagen.model.sparsity import Sparsity
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.separate import SeparateKV


class NSAOps(nn.Module):
    """The ops on the parameters of `NativeSparseAttention`, which documents them.

    How many heads a pass has is read from its tensors: under tensor parallelism a process has some
    of num_kv_heads.
    """

    sparsity: Sparsity
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    softmax_scale: float
    dispatcher: Any
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    gate: Gate
    compress_key: Holder
    compress_value: Holder
    intra_block_pe: Holder
    intra_block_pe_value: Holder

    def add_compression(self, generator: torch.Generator | None = None, **where: Any) -> None:
        """Make the initial parameters of compression.

        Without the compressed branch, keys are compressed only for selection, which has no
        gradient: then these are constants.

        Args:
            where: their device and dtype; PyTorch's defaults if omitted.
        """
        s, shape = self.sparsity, (self.num_kv_heads, self.sparsity.kernel_size)
        hidden = s.mlp_units(self.head_dim)
        k_dim, v_dim = self.head_dim, self.v_head_dim
        w_k = mean_weights(s.key_type, *shape, k_dim, hidden, generator)
        w_v = mean_weights(s.value_type, *shape, v_dim, hidden, generator)
        self.compress_key, self.compress_value = (self.held(w, **where) for w in (w_k, w_v))
        self.intra_block_pe = self.intra_block_pe_value = None
        if s.needs_windows:
            self.intra_block_pe = self.held(torch.zeros(*shape, k_dim), **where)
        if s.embeds_values:
            self.intra_block_pe_value = self.held(torch.zeros(*shape, v_dim), **where)
        if "compressed" not in s.on:
            for made in (self.compress_key, self.intra_block_pe):
                if made is not None:
                    made.requires_grad_(False)

    def held(self, weights: Weights, **where: Any) -> Holder:
        """What the module keeps of compression weights."""
        return holder_of(weights, **where)

    def projections(self) -> list[nn.Linear]:
        """Projections of queries, then of keys and values of each branch that has its own."""
        layers = [self.q_proj, self.k_proj, self.v_proj]
        for branch in self.sparsity.kv_branches[1:]:
            layers += [getattr(self, name) for name in PROJECTIONS[branch]]
        return layers

    def heads(self, x: Tensor) -> Heads:
        """Queries, keys and values of tokens [N, hidden_size]."""
        return self.split([layer(x) for layer in self.projections()])

    def split(self, projected: Sequence[Tensor]) -> Heads:
        """The heads in the outputs of `projections`."""
        q, *rest = projected
        each = iter(rest)
        pairs = [
            KV(self.key(k), v.unflatten(-1, (-1, self.v_head_dim)))
            for k, v in zip(each, each, strict=True)
        ]
        q = self.query(q)
        if len(pairs) == 1:
            return Heads(q, pairs[0], pairs[0], pairs[0])
        selected, compressed, *own = pairs
        return Heads(q, compressed, selected, own[0] if own else selected)

    def query(self, q: Tensor) -> Tensor:
        """[N, HQ, D] before rope, from the projection's output."""
        return q.unflatten(-1, (-1, self.head_dim))

    def key(self, k: Tensor) -> Tensor:
        """[N, HK, D] before rope, from the projection's output."""
        return k.unflatten(-1, (-1, self.head_dim))

    def gates(self, x: Tensor) -> Tensor:
        """[N, HQ, 3]: compressed, selected, sliding; 0 where a branch is off."""
        return self.gate_columns(self.gate(x).sigmoid())

    def gate_columns(self, gate: Tensor) -> Tensor:
        """`gates` from [N, HQ * branches that are on]."""
        return in_columns(gate.unflatten(-1, (-1, len(self.sparsity.on))), self.sparsity.on)

    def rope(self, x: Tensor, positions: Tensor, tables: Tables) -> Tensor:
        return ops.rope(x, *tables, positions, dispatcher=self.dispatcher)

    def turned(self, heads: Heads, positions: Tensor, tables: Tables) -> tuple[Tensor, KV, KV]:
        """q and the selected and the sliding branch's keys after rope."""
        q, selected = self.rope(heads.q, positions, tables), heads.selected
        selected = KV(self.rope(selected.k, positions, tables), selected.v)
        if heads.sliding is heads.selected:
            return q, selected, selected
        return q, selected, KV(self.rope(heads.sliding.k, positions, tables), heads.sliding.v)

    def compress(self, tokens: KV, cu_seqlens: Tensor, lengths: ops.Lengths) -> KV:
        """Windows of keys and values before rope."""
        (k, v), s = tokens, self.sparsity
        w_k, w_v, pe, pe_v = self._compression(k)
        sizes = {"lengths": lengths, "dispatcher": self.dispatcher, **s.window_sizes}
        ck, _ = ops.compress(k, w_k, pe, cu_seqlens, compress_type=s.key_type, **sizes)
        cv, _ = ops.compress(v, w_v, pe_v, cu_seqlens, compress_type=s.value_type, **sizes)
        return KV(ck, cv)

    def _compression(self, like: Tensor) -> tuple[Any, ...]:
        """Weights and position embeddings of keys and of values, in the dtype of the tokens:
        under autocast the parameters have another one."""
        holders = (self.compress_key, self.compress_value)
        holders += (self.intra_block_pe, self.intra_block_pe_value)
        return tuple(weights_of(holder, like) for holder in holders)

    def branches(self, heads: Heads, packed: Packed, tables: Tables) -> Branches:
        """What the branches read of whole sequences."""
        q, selected, sliding = self.turned(heads, packed.positions, tables)
        windows, ends = None, packed.cu_seqlens
        if self.sparsity.needs_windows:
            lengths = packed.lengths_for(**self.sparsity.window_sizes)
            ck, cv = self.compress(heads.compressed, packed.cu_seqlens, lengths)
            windows = KV(self.rope(ck, lengths.window_positions, tables), cv)
            ends = lengths.window_cu_seqlens
        return Branches(q, windows, selected, sliding, packed.cu_seqlens, ends)

    def attend_packed(self, heads: Heads, gate: Tensor, packed: Packed, tables: Tables) -> Tensor:
        """The gated sum of the branches, for whole sequences or a part of them: [N, HQ * Dv]."""
        if packed.remote is not None:
            return packed.remote.sparse(self, heads, gate, packed, tables)
        return self.attend(self.branches(heads, packed, tables), gate)

    def append(
        self, heads: Heads, rows: PrefillRows, cache: NSALayerCache, tables: Tables
    ) -> Branches:
        """Write pieces of sequences to the cache; returns what the branches read of only these."""
        made = None
        if self.sparsity.needs_windows:
            made = self._new_windows(heads.compressed, rows, cache, tables)
        q, selected, sliding = self.turned(heads, rows.positions, tables)
        with torch.no_grad():
            kept = cache.fill(rows, selected, sliding, heads.compressed, made)
        selected, sliding, made = (None if pair is None else KV(*pair) for pair in kept)
        assert rows.windows is not None
        assert selected is not None
        assert sliding is not None
        return Branches(q, made, selected, sliding, rows.cu_seqlens, rows.windows.ends)

    def _new_windows(
        self, tokens: KV, rows: PrefillRows, cache: NSALayerCache, tables: Tables
    ) -> KV:
        """The windows that the tokens complete, keys after rope."""
        windows = rows.windows
        assert windows is not None
        raw = KV(*cache.tokens_before(windows, *tokens))
        sizes = self.sparsity.window_sizes
        lengths = ops.Lengths.of(windows.cu_seqlens, raw.k.shape[0], **sizes)
        ck, cv = self.compress(raw, windows.cu_seqlens, lengths)
        made = windows.positions.shape[0]
        return KV(self.rope(ck[:made], windows.positions, tables), cv[:made])

    def with_context(self, seen: Branches, rows: PrefillRows, cache: NSALayerCache) -> Branches:
        """All keys and values that the queries see, from the cache, which includes the new ones."""
        if rows.context is None:
            return seen
        assert rows.windows is not None
        assert rows.windows.context is not None
        of_tokens = sliding = KV(*cache.seen(rows.context, ("k", "v")))
        if cache.k_window is not None:
            sliding = KV(*cache.seen(rows.context, ("k_window", "v_window")))
        windows = seen.windows
        if windows is not None:
            windows = KV(*cache.seen(rows.windows.context, ("ck", "cv")))
        return replace(
            seen,
            windows=windows,
            selected=of_tokens,
            sliding=sliding,
            q_start=rows.q_start,
            cu_seqlens_k=rows.context.cu_seqlens,
        )

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
        self,
        heads: Heads,
        gate: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: NSALayerCache,
        tables: Tables,
        appended: Sequence[Tensor] = (),
    ) -> Tensor:
        """Append a token of each row to the cache and attend from it: [R, HQ * Dv].

        Args:
            appended: of several tokens of a sequence, the positions that go into the cache
                together; see `DecodeRows`.
        """
        rows, s = (positions, slots), self.sparsity
        common = {"block_table": cache.block_table, "dispatcher": self.dispatcher}
        w_k, w_v, pe, pe_v = self._compression(heads.compressed.k)
        turned = [
            ops.cache_append(
                *(heads.q, heads.selected.k, heads.selected.v),
                *tables,
                *(w_k, w_v, pe),
                *(at, slots),
                *(cache.k, cache.v, cache.ck, cache.cv, cache.k_raw),
                compress_type=s.key_type,
                v_compress_type=s.value_type,
                pe_v=pe_v,
                separate=_separate(heads, cache),
                scales=cache.scales,
                **s.window_sizes,
                **common,
            )
            for at in appended or (positions,)
        ]
        q = turned[0]
        for other in turned[1:]:  # 0 for the rows that are not in it
            q = q + other
        common["softmax_scale"] = self.softmax_scale
        if s.needs_windows:
            o_compressed, topk_idx = ops.compressed_attention_decode(
                *(q, cache.ck, cache.cv),
                *rows,
                ck_scale=cache.ck_scale,
                cv_scale=cache.cv_scale,
                **s.selection_sizes,
                **common,
            )
        else:  # neither is read
            o_compressed = q.new_zeros(*q.shape[:2], cache.v.shape[-1])
            topk_idx = positions.new_full((cache.k.shape[-2], q.shape[0], 1), -1)
        o = ops.native_sparse_attention_decode(
            *(q, cache.k, cache.v, topk_idx),
            *rows,
            *(o_compressed, gate),
            block_size=s.block_size,
            window_size=s.window_size,
            branches=s.on,
            k_window_cache=cache.k_window,
            v_window_cache=cache.v_window,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            **common,
        )
        return o.flatten(1)


def _separate(heads: Heads, cache: NSALayerCache) -> SeparateKV | None:
    """What `cache_append` takes if the compressed branch has its own keys and values."""
    if cache.v_raw is None or cache.k_scale is not None:
        return None
    _, sliding = cache.of_tokens
    return SeparateKV(*heads.compressed, *heads.sliding, cache.v_raw, *sliding)
