"""What Native Sparse Attention is made of: its parameters, and the ops on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsagen import ops
from nsagen.model.checks import require
from nsagen.model.configs import check_sparsity
from nsagen.model.layers import RMSNorm, joined_weight, linear, project
from nsagen.model.rope import RopeConfig, RotaryEmbedding


@dataclass(frozen=True)
class Branches:
    """What the three branches read; q, k and ck are after rope.

    `q_start` and `cu_seqlens_k` are given where sequences have more keys than queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    cu_seqlens: Tensor
    window_cu_seqlens: Tensor
    q_start: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


class NSAParts(nn.Module):
    """The parameters of `NativeSparseAttention`, which documents them, and the ops on them."""

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
        rope: RotaryEmbedding | None = None,
        dispatcher: Any = None,
        initializer_range: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.compress_type = compress_type
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride
        self.block_size, self.topk = block_size, topk
        self.init_blocks, self.local_blocks = init_blocks, local_blocks
        self.window_size = window_size
        self.dispatcher = dispatcher
        check_sparsity(self)
        self._windows: dict[str, Any] = {
            "kernel_size": kernel_size,
            "kernel_stride": kernel_stride,
        }
        self._selection: dict[str, Any] = {
            **self._windows,
            "block_size": block_size,
            "topk": topk,
            "init_blocks": init_blocks,
            "local_blocks": local_blocks,
        }
        self._scale: dict[str, Any] = {
            "softmax_scale": head_dim**-0.5,
            "dispatcher": dispatcher,
        }
        require(
            num_q_heads % num_kv_heads == 0,
            "NativeSparseAttention",
            "num_q_heads must be a multiple of num_kv_heads",
            f"{num_q_heads} and {num_kv_heads}",
            "change either",
        )
        self.rotary_emb = rope or RotaryEmbedding(rope_config or RopeConfig(head_dim=head_dim))
        q_dim, kv_dim = num_q_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = linear(hidden_size, q_dim, initializer_range, generator)
        self.k_proj = linear(hidden_size, kv_dim, initializer_range, generator)
        self.v_proj = linear(hidden_size, kv_dim, initializer_range, generator)
        self.o_proj = linear(q_dim, hidden_size, initializer_range, generator)
        self.gate = linear(hidden_size, num_q_heads * 3, initializer_range, generator)
        self.compress_key = self._mean_weights()
        self.compress_value = self._mean_weights()
        self.intra_block_pe = nn.Parameter(torch.zeros(num_kv_heads, kernel_size, head_dim))

    def _mean_weights(self) -> nn.Parameter | None:
        """Compression weights with which a window's result is its mean."""
        heads, size, dim = self.num_kv_heads, self.kernel_size, self.head_dim
        if self.compress_type == "avgpool":
            return None
        if self.compress_type == "weightedpool":
            return nn.Parameter(torch.full((heads, size), 1 / size))
        return nn.Parameter((torch.eye(dim) / size).repeat(heads, size, 1))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, HQ, D], k and v [N, HK, D], before rope."""
        q = self.q_proj(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return q, k, v

    def fused_qkv(self, x: Tensor, norm: RMSNorm | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v as `qkv`, and the gates, by one product; for inference."""
        q_dim, kv_dim = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = (q_dim, kv_dim, kv_dim, 3 * self.num_q_heads)
        y = project(
            x,
            joined_weight(self.q_proj, self.k_proj, self.v_proj, self.gate),
            norm=norm,
            sigmoid_from=q_dim + 2 * kv_dim,
            dispatcher=self.dispatcher,
        )
        q, k, v, gate = y.split(sizes, -1)
        k, v = (t.unflatten(-1, (self.num_kv_heads, self.head_dim)) for t in (k, v))
        heads = self.num_q_heads
        return q.unflatten(-1, (heads, self.head_dim)), k, v, gate.unflatten(-1, (heads, 3))

    def gates(self, x: Tensor) -> Tensor:
        """[N, HQ, 3]: compressed, selected, sliding."""
        return self.gate(x).sigmoid().unflatten(-1, (self.num_q_heads, 3))

    def compress(
        self, x: Tensor, weight: Tensor | None, pe: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Under autocast the tokens have another dtype than the parameters.
        weight, pe = (t if t is None else t.to(x.dtype) for t in (weight, pe))
        return ops.compress(
            *(x, weight, pe, cu_seqlens),
            compress_type=self.compress_type,
            **self._windows,
            dispatcher=self.dispatcher,
        )

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        tables = (self.rotary_emb.cos, self.rotary_emb.sin)
        return ops.rope(x, *tables, positions, dispatcher=self.dispatcher)

    def attend(self, b: Branches, gate: Tensor) -> Tensor:
        """The gated sum of the three branches: [N, HQ * D]."""
        offsets = {"q_start": b.q_start, "cu_seqlens_k": b.cu_seqlens_k}
        o_compressed, topk_idx = ops.compressed_attention(
            *(b.q, b.ck, b.cv),
            cu_seqlens_q=b.cu_seqlens,
            cu_seqlens_k=b.window_cu_seqlens,
            **self._selection,
            sm_scale=self._scale["softmax_scale"],
            q_start=b.q_start,
            dispatcher=self.dispatcher,
        )
        o_selected = ops.topk_sparse_attention(
            *(b.q, b.k, b.v, topk_idx, self.block_size, b.cu_seqlens), **offsets, **self._scale
        )
        o_sliding = ops.sliding_window_attention(
            *(b.q, b.k, b.v, self.window_size, b.cu_seqlens), **offsets, **self._scale
        )
        o = ops.gated_sum(o_compressed, o_selected, o_sliding, gate, dispatcher=self.dispatcher)
        return o.flatten(1)
