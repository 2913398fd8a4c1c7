"""The attention module: projections, compression, three branches and their gates."""

from __future__ import annotations

from torch import Tensor

from nsagen.model.layer_cache import NSALayerCache
from nsagen.model.layers import RMSNorm, project
from nsagen.model.nsa_parts import NSAParts
from nsagen.model.packing import Packed
from nsagen.model.prefill import PrefillRows


class NativeSparseAttention(NSAParts):
    """Native Sparse Attention over a packed batch, for training, prefill and decoding.

    Args:
        compress_type: "avgpool", "weightedpool", "linear", "mlp" or "sigmoid_mul".
        hidden_size: width of the input and output.
        num_q_heads: query heads HQ; a multiple of num_kv_heads.
        num_kv_heads: key/value heads HK.
        head_dim: head size D; v_head_dim: of values, Dv; None for head_dim.
        kernel_size, kernel_stride: tokens a compression window covers; from one to the next.
        block_size: tokens of a selection block.
        topk, init_blocks, local_blocks: blocks a query selects; of them always the first ones
            and the last ones up to its own.
        window_size: tokens of the sliding window, the query's own included.
        branches, branch_kv, v_compress_type, mlp_hidden, v_with_pe, gate_type, gate_hidden: the
            paper's own form; see `Sparsity`.
        rope_config: settings for the rope tables, unless `rope` brings them.
        rope: tables to share between layers.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        initializer_range: standard deviation of the initial projections.
        generator: source of the initial weights; None for PyTorch's own.

    Beside q_proj, k_proj, v_proj and o_proj, which are Llama's, the parameters are

    - `gate`: a linear layer, or for an "mlp" gate two, `gate.up_proj` and `gate.down_proj`, for
      each head and branch that is on;
    - `compress_key` and `compress_value`: none for "avgpool", [HK, kernel_size] for
      "weightedpool", [HK, kernel_size, D] for "sigmoid_mul", [HK, kernel_size * D, D] for
      "linear", and for "mlp" `.up` [HK, kernel_size * D, H] and `.down` [HK, H, D]. With the
      initial ones a window's result is its mean, or for "mlp" near it;
    - `intra_block_pe` [HK, kernel_size, D], added to the keys of a window, and with v_with_pe
      `intra_block_pe_value`; both start at 0;
    - with branch_kv="separate" `k_proj_compressed`, `v_proj_compressed`, `k_proj_sliding` and
      `v_proj_sliding`; k_proj and v_proj are then the selected branch's, or the sliding one's
      where that is off.

    What only a branch that is off would read is not there. Without the compressed branch the
    compression of keys, by which the selected one chooses, cannot be trained: it is constant.

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
        seen = self.branches(self.heads(x), packed, self.rotary_emb.tables)
        return self.o_proj(self.attend(seen, self.gates(x)))

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
        heads, gate = self.fused_heads(x, norm)
        seen = self.append(heads, rows, cache, self.rotary_emb.tables)
        seen = self.with_context(seen, rows, cache)
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
        heads, gate = self.fused_heads(x, norm)
        tables = self.rotary_emb.tables
        o = self.decode_heads(heads, gate, positions, slots, cache, tables)
        return project(o, self.o_proj.weight, residual=residual, dispatcher=self.dispatcher)
