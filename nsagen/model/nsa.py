"""The attention module: projections, compression, three branches and their gates."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from nsagen.core.branches import BRANCHES
from nsagen.model.checks import (
    is_integer,
    require,
    require_dispatcher,
    require_generator,
    require_head_dim,
    require_kind,
)
from nsagen.model.fused import JoinsWeights, own
from nsagen.model.gate import after_first_layer, first_layer, new_gate
from nsagen.model.heads import PROJECTIONS, Heads
from nsagen.model.layer_cache import NSALayerCache
from nsagen.model.layers import RMSNorm, linear, project
from nsagen.model.memory import require_memory
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.packing import Packed
from nsagen.model.prefill import CachedRows, DecodeRows
from nsagen.model.rope import RopeConfig, RotaryEmbedding
from nsagen.model.sparsity import Sparsity


@own
class NativeSparseAttention(JoinsWeights, NSAOps):
    """Native Sparse Attention over a packed batch, for training, prefill and decoding.

    Args:
        compress_type: "avgpool", "weightedpool", "linear", "mlp" or "sigmoid_mul".
        hidden_size: width of the input and output.
        num_q_heads: query heads HQ; a multiple of num_kv_heads.
        num_kv_heads: key/value heads HK.
        head_dim: head size D; v_head_dim: of values, Dv; None for head_dim.
        kernel_size, kernel_stride: tokens in a compression window; tokens between window starts.
        block_size: tokens of a selection block.
        topk, init_blocks, local_blocks: blocks that a query selects, always including the first
            ones and the last ones up to its own.
        window_size: tokens of the sliding window, the query's own included.
        branches, branch_kv, v_compress_type, mlp_hidden, v_with_pe, gate_type, gate_hidden: the
            paper's own form; see `Sparsity`.
        rope_config: settings for the rope tables, unless `rope` brings them.
        rope: tables to share between layers.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        initializer_range: standard deviation of the initial projections.
        generator: source of the initial weights; None for PyTorch's own.

    Besides q_proj, k_proj, v_proj and o_proj, which are Llama's, the parameters are

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

    Parameters that only an inactive branch would read do not exist. Without the compressed branch,
    the compression of keys, by which the selected branch chooses, is constant and untrained.

    Attributes:
        head_ranks: processes that share the heads under tensor parallelism.

    Raises:
        InvalidInputError: parameters that do not fit together, or of another kind.
    """

    rotary_emb: RotaryEmbedding
    head_ranks = 1

    def __init__(
        self,
        compress_type: str,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        block_size: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        window_size: int,
        rope_config: RopeConfig | None = None,
        *,
        v_head_dim: int | None = None,
        branches: tuple[str, ...] = BRANCHES,
        branch_kv: str = "shared",
        v_compress_type: str | None = None,
        mlp_hidden: int | None = None,
        v_with_pe: bool = False,
        gate_type: str = "linear",
        gate_hidden: int | None = None,
        rope: RotaryEmbedding | None = None,
        dispatcher: Any = None,
        initializer_range: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        where = "NativeSparseAttention"
        sizes = {"hidden_size": hidden_size, "num_q_heads": num_q_heads}
        for name, value in {**sizes, "num_kv_heads": num_kv_heads}.items():
            fits = is_integer(value) and value > 0
            require(fits, where, f"{name} must be a positive integer", repr(value), "pass one")
        require_head_dim(where, "head_dim", head_dim)
        if v_head_dim is not None:
            require_head_dim(where, "v_head_dim", v_head_dim)
        hidden_size, num_q_heads, num_kv_heads, head_dim = map(
            operator.index, (hidden_size, num_q_heads, num_kv_heads, head_dim)
        )
        if rope is not None:
            require_kind(where, "rope", rope, RotaryEmbedding, "build one of a RopeConfig")
        if rope_config is not None:
            require_kind(where, "rope_config", rope_config, RopeConfig, "build one")
        require_dispatcher(where, dispatcher)
        require_generator(where, generator)
        super().__init__()
        self.sparsity = Sparsity(
            compress_type=compress_type,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            block_size=block_size,
            topk=topk,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
            window_size=window_size,
            branches=branches,
            branch_kv=branch_kv,
            v_compress_type=v_compress_type,
            mlp_hidden=mlp_hidden,
            v_with_pe=v_with_pe,
            gate_type=gate_type,
            gate_hidden=gate_hidden,
        )
        require(
            num_q_heads % num_kv_heads == 0,
            where,
            "num_q_heads must be a multiple of num_kv_heads",
            f"{num_q_heads} and {num_kv_heads}",
            "change either",
        )
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.v_head_dim = head_dim if v_head_dim is None else operator.index(v_head_dim)
        self.softmax_scale, self.dispatcher = head_dim**-0.5, dispatcher
        self.rotary_emb = rope or RotaryEmbedding(rope_config or RopeConfig(head_dim=head_dim))
        std = initializer_range
        self.q_proj = linear(hidden_size, num_q_heads * head_dim, std, generator)
        for branch in self.sparsity.kv_branches:
            dims = (head_dim, self.v_head_dim)
            for name, dim in zip(PROJECTIONS[branch], dims, strict=True):
                setattr(self, name, linear(hidden_size, num_kv_heads * dim, std, generator))
        self.o_proj = linear(num_q_heads * self.v_head_dim, hidden_size, std, generator)
        gates, units = num_q_heads * len(self.sparsity.on), self.sparsity.gate_units(head_dim)
        self.gate = new_gate(hidden_size, gates, units, std, generator)
        self.add_compression(generator)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packed,
        packed: Packed | CachedRows | None = None,
        cache: NSALayerCache | None = None,
    ) -> Tensor:
        """Attend within each sequence of a packed batch.

        Args:
            x: [N, hidden_size].
            cu_seqlens: int32 [batch+1], where each sequence starts; the last entry is N. Or a
                layout, such as a shard of `nsagen.distributed`.
            packed: the layout, if the caller already has it.
            cache: earlier tokens of the sequences, to which these are added; `packed` then says
                where. Without gradients.

        Returns:
            [N, hidden_size], in x's dtype; with a cache, idle rows hold nothing of use.
        """
        if cache is not None:
            assert isinstance(packed, CachedRows)
            # Under autocast products have another dtype than the cache and the residual stream.
            heads = self.split([layer(x).to(x.dtype) for layer in self.projections()])
            return self.o_proj(self._behind(heads, self.gates(x).to(x.dtype), packed, cache))
        assert not isinstance(packed, CachedRows)
        if packed is None:  # called by itself, not by a model that has checked its weights
            require_memory("NativeSparseAttention.forward", self, x)
            if isinstance(cu_seqlens, Packed):
                packed = cu_seqlens
            else:
                packed = Packed.of(cu_seqlens, x.shape[0])
        tables = self.rotary_emb.tables(x)
        return self.o_proj(self.attend_packed(self.heads(x), self.gates(x), packed, tables))

    def fused(
        self, x: Tensor, rows: CachedRows, cache: NSALayerCache, norm: RMSNorm, residual: Tensor
    ) -> Tensor:
        """residual + forward(norm(x)) with a cache, by two products around attention.

        x and residual [N, hidden_size]; returns the same shape.
        """
        heads, gate = self.fused_heads(x, norm)
        o = self._behind(heads, gate, rows, cache)
        return project(o, self.o_proj.weight, residual=residual, dispatcher=self.dispatcher)

    def _behind(self, heads: Heads, gate: Tensor, rows: CachedRows, cache: NSALayerCache) -> Tensor:
        """Add tokens to the cache and attend with them: [N, HQ * Dv]."""
        tables = self.rotary_emb.tables(heads.q)
        if isinstance(rows, DecodeRows):
            places = (rows.positions, rows.slots, cache, tables, rows.appended)
            return self.decode_heads(heads, gate, *places)
        seen = self.append(heads, rows, cache, tables)
        return self.attend(self.with_context(seen, rows, cache), gate)

    def joined_layers(self) -> list[nn.Linear]:
        return [*self.projections(), first_layer(self.gate)]

    def fused_heads(self, x: Tensor, norm: RMSNorm | None) -> tuple[Heads, Tensor]:
        """`heads` and `gates` of norm(x), by one product; for inference."""
        layers = self.joined_layers()
        sizes = [layer.out_features for layer in layers]
        y = project(
            x,
            self.joined_weight(),
            norm=norm,
            sigmoid_from=sum(sizes[:-1]) if layers[-1] is self.gate else None,
            dispatcher=self.dispatcher,
        )
        *projected, gate = y.split(sizes, -1)
        gate = after_first_layer(self.gate, gate, self.dispatcher)
        return self.split(projected), self.gate_columns(gate)
