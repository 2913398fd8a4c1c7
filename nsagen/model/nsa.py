"""The attention module: projections, compression, three branches and their gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsagen import ops
from nsagen.model.cache import NSALayerCache, PrefillRows
from nsagen.model.checks import require
from nsagen.model.configs import check_sparsity
from nsagen.model.layers import linear
from nsagen.model.packing import Packed
from nsagen.model.rope import RopeConfig, RotaryEmbedding
from nsagen.ops.layout import positions_in_sequence


@dataclass(frozen=True)
class _Branches:
    """What the three branches read, and what prefill keeps: q, k and ck are after rope."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_raw: Tensor
    ck: Tensor
    cv: Tensor
    window_cu_seqlens: Tensor


class NativeSparseAttention(nn.Module):
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
        branches = self._project(x, packed)
        return self._attend(x, packed, branches)

    def prefill(self, x: Tensor, packed: Packed, rows: PrefillRows, cache: NSALayerCache) -> Tensor:
        """`forward` that also writes the prompts into the cache."""
        b = self._project(x, packed)
        cache.fill(rows, b.k, b.v, b.ck, b.cv, b.k_raw)
        return self._attend(x, packed, b)

    def decode(self, x: Tensor, positions: Tensor, slots: Tensor, cache: NSALayerCache) -> Tensor:
        """Attend with one new token of each sequence, after appending it to the cache.

        Args:
            x: [R, hidden_size], one row a sequence.
            positions: int32 [R], the new token's position; -1 for an idle row.
            slots: int32 [R], the sequence's slot in the cache.
            cache: this layer's cache, holding all tokens before the position; written in place.

        Returns:
            [R, hidden_size]; idle rows hold nothing of use.
        """
        rows = (positions, slots)
        q = ops.cache_append(
            *self._qkv(x),
            *(self.rotary_emb.cos, self.rotary_emb.sin),
            *(self.compress_key, self.compress_value, self.intra_block_pe),
            *rows,
            *(cache.k, cache.v, cache.ck, cache.cv, cache.k_raw),
            compress_type=self.compress_type,
            **self._windows,
            dispatcher=self.dispatcher,
        )
        o_compressed, topk_idx = ops.compressed_attention_decode(
            q, cache.ck, cache.cv, *rows, **self._selection, **self._scale
        )
        o = ops.native_sparse_attention_decode(
            *(q, cache.k, cache.v, topk_idx),
            *rows,
            *(o_compressed, self._gates(x)),
            block_size=self.block_size,
            window_size=self.window_size,
            **self._scale,
        )
        return self.o_proj(o.flatten(1))

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, HQ, D], k and v [N, HK, D], before rope."""
        q = self.q_proj(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return q, k, v

    def _gates(self, x: Tensor) -> Tensor:
        """[N, HQ, 3]: compressed, selected, sliding."""
        return self.gate(x).sigmoid().unflatten(-1, (self.num_q_heads, 3))

    def _compress(
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

    def _rope(self, x: Tensor, positions: Tensor) -> Tensor:
        tables = (self.rotary_emb.cos, self.rotary_emb.sin)
        return ops.rope(x, *tables, positions, dispatcher=self.dispatcher)

    def _project(self, x: Tensor, packed: Packed) -> _Branches:
        q, k, v = self._qkv(x)
        ck, window_cu_seqlens = self._compress(
            k, self.compress_key, self.intra_block_pe, packed.cu_seqlens
        )
        cv, _ = self._compress(v, self.compress_value, None, packed.cu_seqlens)
        windows = positions_in_sequence(window_cu_seqlens, ck.shape[0])
        return _Branches(
            q=self._rope(q, packed.positions),
            k=self._rope(k, packed.positions),
            v=v,
            k_raw=k,
            ck=self._rope(ck, windows * self.kernel_stride),
            cv=cv,
            window_cu_seqlens=window_cu_seqlens,
        )

    def _attend(self, x: Tensor, packed: Packed, b: _Branches) -> Tensor:
        o_compressed, topk_idx = ops.compressed_attention(
            *(b.q, b.ck, b.cv),
            cu_seqlens_q=packed.cu_seqlens,
            cu_seqlens_k=b.window_cu_seqlens,
            **self._selection,
            sm_scale=self._scale["softmax_scale"],
            dispatcher=self.dispatcher,
        )
        o_selected = ops.topk_sparse_attention(
            *(b.q, b.k, b.v, topk_idx, self.block_size, packed.cu_seqlens), **self._scale
        )
        o_sliding = ops.sliding_window_attention(
            *(b.q, b.k, b.v, self.window_size, packed.cu_seqlens), **self._scale
        )
        gate = self._gates(x)
        o = ops.gated_sum(o_compressed, o_selected, o_sliding, gate, dispatcher=self.dispatcher)
        return self.o_proj(o.flatten(1))
