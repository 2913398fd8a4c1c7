"""Native Sparse Attention in the place of an attention module of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsagen import ops
from nsagen.errors import InvalidInputError
from nsagen.integrations.initial import Gates, constant_gate, mean_weights
from nsagen.integrations.transformers_cache import NSALayer, layer_of
from nsagen.integrations.transformers_layout import Layout, Layouts
from nsagen.model.rope import RotaryEmbedding
from nsagen.ops.layout import positions_in_sequence


class TransformersNSA(nn.Module):
    """Takes what an attention module of Llama, Mistral or Qwen3 takes.

    Its q_proj, k_proj, v_proj, o_proj and, for Qwen3, q_norm and k_norm are the replaced
    module's own; its other parameters have the names and shapes of `NativeSparseAttention`'s.

    Args:
        dense: the module to replace.
        settings: compress_type, kernel_size, kernel_stride, block_size, topk, init_blocks,
            local_blocks and window_size; checked.
        rope: tables that all layers share.
        layouts: the layouts that all layers share.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        gates: what the gates start as.
    """

    def __init__(
        self,
        dense: Any,
        settings: Mapping[str, Any],
        rope: RotaryEmbedding,
        layouts: Layouts,
        dispatcher: Any,
        gates: Gates,
    ) -> None:
        super().__init__()
        config, head_dim = dense.config, dense.head_dim
        self.layer_idx, self.layouts, self.dispatcher = dense.layer_idx, layouts, dispatcher
        self.settings, self.scale = dict(settings), dense.scaling
        self.kernel_size, self.kernel_stride = settings["kernel_size"], settings["kernel_stride"]
        self.num_q_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim
        self.rotary_emb = rope
        self.q_proj, self.k_proj, self.v_proj = dense.q_proj, dense.k_proj, dense.v_proj
        self.o_proj = dense.o_proj
        self.q_norm, self.k_norm = getattr(dense, "q_norm", None), getattr(dense, "k_norm", None)
        like = dense.o_proj.weight
        where = {
            "device": like.device,
            "dtype": like.dtype if like.is_floating_point() else torch.get_default_dtype(),
        }
        self.gate = constant_gate(config.hidden_size, self.num_q_heads, gates).to(**where)
        shape = (self.num_kv_heads, self.kernel_size, head_dim)
        self.compress_key, self.compress_value = (
            None if mean is None else nn.Parameter(mean.to(**where))
            for mean in (mean_weights(settings["compress_type"], *shape) for _ in range(2))
        )
        self.intra_block_pe = nn.Parameter(torch.zeros(shape, **where))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend within each row of a batch.

        Args:
            hidden_states: [B, T, hidden].
            position_embeddings: not used: rope has float32 tables of its own in any dtype.
            attention_mask: [B, T or more], 0 at padding, or None.
            cache: Transformers' `Cache`; its older versions call it past_key_values.
            cu_seq_lens_q: int32 [sequences + 1], for sequences packed into one row.

        Returns:
            [B, T, hidden], and None for the attention weights, which NSA never forms.
        """
        x, cache = hidden_states, cache if cache is not None else past_key_values
        if cu_seq_lens_q is not None:
            if cache is not None or x.shape[0] != 1:
                raise InvalidInputError(
                    "apply_nsa: packed sequences must be one row without a cache; got "
                    f"{x.shape[0]} rows, {'no' if cache is None else 'a'} cache; use_cache=False"
                )
            return self._attend(x[0], cu_seq_lens_q.to(torch.int32))[None], None
        layer = None
        if cache is not None:
            layer = layer_of(cache, self.layer_idx, self.kernel_size, self.kernel_stride)
            if layer.seen:
                return self._continue(x, layer), None
        layout = self.layouts.of(x, attention_mask)
        packed = layout.pack(x)
        if layer is not None:
            self._fill(packed, layout, layer)
        return layout.unpack(self._attend(packed, layout.cu_seqlens)), None

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, HQ, D], k and v [N, HK, D], before rope."""
        q = self.q_proj(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _gates(self, x: Tensor) -> Tensor:
        """[N, HQ, 3]: compressed, selected, sliding."""
        return self.gate(x).sigmoid().unflatten(-1, (self.num_q_heads, 3))

    def _attend(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Packed sequences without a cache: [N, hidden] to the same."""
        o = ops.native_sparse_attention(
            *self._qkv(x),
            self._gates(x),
            cu_seqlens=cu_seqlens,
            **self.settings,
            w_k=self.compress_key,
            w_v=self.compress_value,
            pe=self.intra_block_pe,
            cos=self.rotary_emb.cos,
            sin=self.rotary_emb.sin,
            softmax_scale=self.scale,
            dispatcher=self.dispatcher,
        )
        return self.o_proj(o.flatten(1))

    @torch.no_grad()
    def _fill(self, x: Tensor, layout: Layout, layer: NSALayer) -> None:
        """Write the first tokens to a cache.

        `_attend` projects and compresses them once more: that is a small part of its work, and
        so it can stay the one op that training uses.
        """
        _, k, v = self._qkv(x)
        tables = (self.rotary_emb.cos, self.rotary_emb.sin)
        windows = {
            "compress_type": self.settings["compress_type"],
            "kernel_size": self.kernel_size,
            "kernel_stride": self.kernel_stride,
            "dispatcher": self.dispatcher,
        }
        ends = layout.cu_seqlens
        ck, window_ends = ops.compress(k, self.compress_key, self.intra_block_pe, ends, **windows)
        cv, _ = ops.compress(v, self.compress_value, None, ends, **windows)
        starts = positions_in_sequence(window_ends, ck.shape[0]) * self.kernel_stride
        ck = ops.rope(ck, *tables, starts, dispatcher=self.dispatcher)
        turned = ops.rope(k, *tables, layout.positions, dispatcher=self.dispatcher)
        layer.fill(layout, turned, v, ck, cv, k)

    def _continue(self, x: Tensor, layer: NSALayer) -> Tensor:
        """New tokens of each row behind cached ones, one after another: [B, T, hidden]."""
        outputs = [self._decode(x[:, token], layer) for token in range(x.shape[1])]
        return torch.stack(outputs, 1)

    @torch.no_grad()
    def _decode(self, x: Tensor, layer: NSALayer) -> Tensor:
        """One new token of each row: [B, hidden] to the same."""
        batch = x.shape[0]
        store = layer.reserve(batch, layer.seen + 1, x.new_empty(self.num_kv_heads, self.head_dim))
        rows = (layer.lengths, torch.arange(batch, dtype=torch.int32, device=x.device))
        settings = dict(self.settings)
        compress_type, window_size = settings.pop("compress_type"), settings.pop("window_size")
        common = {"softmax_scale": self.scale, "dispatcher": self.dispatcher}
        q = ops.cache_append(
            *self._qkv(x),
            *(self.rotary_emb.cos, self.rotary_emb.sin),
            *(self.compress_key, self.compress_value, self.intra_block_pe),
            *rows,
            *store.tensors(),
            compress_type=compress_type,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            dispatcher=self.dispatcher,
        )
        o_compressed, topk_idx = ops.compressed_attention_decode(
            q, store.ck, store.cv, *rows, **settings, **common
        )
        o = ops.native_sparse_attention_decode(
            *(q, store.k, store.v, topk_idx),
            *rows,
            *(o_compressed, self._gates(x)),
            block_size=settings["block_size"],
            window_size=window_size,
            **common,
        )
        layer.lengths, layer.seen = layer.lengths + 1, layer.seen + 1
        return self.o_proj(o.flatten(1))
