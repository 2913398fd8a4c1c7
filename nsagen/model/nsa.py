"""The attention module: projections, compression, three branches and their gates."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nsagen import ops
from nsagen.model.cache import NSALayerCache
from nsagen.model.layers import RMSNorm, project
from nsagen.model.nsa_parts import Branches, NSAParts
from nsagen.model.packing import Packed
from nsagen.model.prefill import PrefillRows
from nsagen.ops.layout import positions_in_sequence


class NativeSparseAttention(NSAParts):
    """Native Sparse Attention over a packed batch, for training, prefill and decoding.

    Args:
        compress_type: "avgpool", "weightedpool" or "linear".
        hidden_size: width of the input and output.
        num_q_heads: query heads HQ; a multiple of num_kv_heads.
        num_kv_heads: key/value heads HK.
        head_dim: head size D.
        kernel_size, kernel_stride: tokens a compression window covers; from one to the next.
        block_size: tokens of a selection block.
        topk, init_blocks, local_blocks: blocks a query selects; of them always the first ones
            and the last ones up to its own.
        window_size: tokens of the sliding window, the query's own included.
        rope_config: settings for the rope tables, unless `rope` brings them.
        rope: tables to share between layers.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        initializer_range: standard deviation of the initial projections.
        generator: source of the initial weights; None for PyTorch's own.

    The parameters `compress_key` and `compress_value` are [HK, kernel_size] for "weightedpool"
    and [HK, kernel_size * D, D] for "linear", both starting as the mean; `intra_block_pe`
    [HK, kernel_size, D] is added to the keys of a window and starts at 0.

    Raises:
        InvalidInputError: parameters that do not fit each other.
    """

    def forward(self, x: Tensor, cu_seqlens: Tensor, packed: Packed | None = None) -> Tensor:
        """Attend within each sequence of a packed batch.

        Args:
            x: [N, hidden_size].
            cu_seqlens: int32 [batch+1], where each sequence starts; the last entry is N.
            packed: the layout, where the caller has it already.

        Returns:
            [N, hidden_size], in x's dtype.
        """
        packed = packed or Packed.of(cu_seqlens, x.shape[0])
        return self.o_proj(self.attend(self._project(x, packed), self.gates(x)))

    def prefill(
        self,
        x: Tensor,
        rows: PrefillRows,
        cache: NSALayerCache,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward` over pieces of sequences, whose earlier tokens the cache holds.

        Args:
            x: [N, hidden_size].
            rows: the layout.
            cache: this layer's cache; written in place.
            norm: applied to x first.
            residual: added to the result.

        Returns:
            [N, hidden_size].
        """
        q, k_raw, v, gate = self.fused_qkv(x, norm)
        windows = rows.windows
        assert windows is not None
        # The cache's ring of keys before rope is read before `fill` writes to it.
        keys = windows.with_carried(k_raw, cache.k_raw, windows.carried)
        values = windows.with_carried(v, cache.v, windows.carried_values)
        made = windows.positions.shape[0]
        ck, _ = self.compress(keys, self.compress_key, self.intra_block_pe, windows.cu_seqlens)
        cv, _ = self.compress(values, self.compress_value, None, windows.cu_seqlens)
        ck, cv = self.rope(ck[:made], windows.positions), cv[:made]
        q, k = self.rope(q, rows.positions), self.rope(k_raw, rows.positions)
        cache.fill(rows, k, v, ck, cv, k_raw)
        seen = Branches(q, k, v, ck, cv, rows.cu_seqlens, windows.ends)
        if rows.context is not None and windows.context is not None:
            seen = replace(
                seen,
                k=rows.context.of(cache.k),
                v=rows.context.of(cache.v),
                ck=windows.context.of(cache.ck),
                cv=windows.context.of(cache.cv),
                q_start=rows.q_start,
                cu_seqlens_k=rows.context.cu_seqlens,
            )
        o = self.attend(seen, gate)
        return project(o, self.o_proj.weight, residual=residual, dispatcher=self.dispatcher)

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: NSALayerCache,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attend with one new token of each sequence, after appending it to the cache.

        Args:
            x: [R, hidden_size], one row a sequence.
            positions: int32 [R], the new token's position; -1 for an idle row.
            slots: int32 [R], the sequence's slot in the cache.
            cache: this layer's cache, holding all tokens before the position; written in place.
            norm: applied to x first.
            residual: added to the result.

        Returns:
            [R, hidden_size]; idle rows hold nothing of use.
        """
        rows = (positions, slots)
        q, k, v, gate = self.fused_qkv(x, norm)
        q = ops.cache_append(
            *(q, k, v),
            *(self.rotary_emb.cos, self.rotary_emb.sin),
            *(self.compress_key, self.compress_value, self.intra_block_pe),
            *rows,
            *(cache.k, cache.v, cache.ck, cache.cv, cache.k_raw),
            compress_type=self.compress_type,
            **self._windows,
            block_table=cache.block_table,
            dispatcher=self.dispatcher,
        )
        o_compressed, topk_idx = ops.compressed_attention_decode(
            *(q, cache.ck, cache.cv),
            *rows,
            **self._selection,
            block_table=cache.block_table,
            **self._scale,
        )
        o = ops.native_sparse_attention_decode(
            *(q, cache.k, cache.v, topk_idx),
            *rows,
            *(o_compressed, gate),
            block_size=self.block_size,
            window_size=self.window_size,
            block_table=cache.block_table,
            **self._scale,
        )
        return project(
            o.flatten(1), self.o_proj.weight, residual=residual, dispatcher=self.dispatcher
        )

    def _project(self, x: Tensor, packed: Packed) -> Branches:
        q, k, v = self.qkv(x)
        ck, window_cu_seqlens = self.compress(
            k, self.compress_key, self.intra_block_pe, packed.cu_seqlens
        )
        cv, _ = self.compress(v, self.compress_value, None, packed.cu_seqlens)
        windows = positions_in_sequence(window_cu_seqlens, ck.shape[0])
        return Branches(
            q=self.rope(q, packed.positions),
            k=self.rope(k, packed.positions),
            v=v,
            ck=self.rope(ck, windows * self.kernel_stride),
            cv=cv,
            cu_seqlens=packed.cu_seqlens,
            window_cu_seqlens=window_cu_seqlens,
        )
