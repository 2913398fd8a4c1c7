"""What Native Sparse Attention is made of: its parameters, as they start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.model.checks import require
from nsagen.model.gate import after_first_layer, first_layer, new_gate
from nsagen.model.heads import PROJECTIONS, Heads
from nsagen.model.layers import RMSNorm, joined_weight, linear, project
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.rope import RopeConfig, RotaryEmbedding
from nsagen.model.sparsity import Sparsity


class NSAParts(NSAOps):
    """The parameters of `NativeSparseAttention`, which documents them."""

    rotary_emb: RotaryEmbedding

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
            "NativeSparseAttention",
            "num_q_heads must be a multiple of num_kv_heads",
            f"{num_q_heads} and {num_kv_heads}",
            "change either",
        )
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
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

    def fused_heads(self, x: Tensor, norm: RMSNorm | None) -> tuple[Heads, Tensor]:
        """`heads` and `gates` of norm(x), by one product; for inference."""
        layers = [*self.projections(), first_layer(self.gate)]
        sizes = [layer.out_features for layer in layers]
        y = project(
            x,
            joined_weight(*layers),
            norm=norm,
            sigmoid_from=sum(sizes[:-1]) if layers[-1] is self.gate else None,
            dispatcher=self.dispatcher,
        )
        *projected, gate = y.split(sizes, -1)
        gate = after_first_layer(self.gate, gate, self.dispatcher)
        return self.split(projected), self.gate_columns(gate)
