"""Native Sparse Attention in the place of an attention module of Transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.integrations.transformers_cache import NSALayer, layer_of
from nsagen.integrations.transformers_layout import Layouts
from nsagen.model.heads import PROJECTIONS
from nsagen.model.initial import Gates, constant_gate
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.packing import Packed
from nsagen.model.rope import RotaryEmbedding
from nsagen.model.sparsity import Sparsity


class TransformersNSA(NSAOps):
    """Takes what an attention module of Llama, Mistral or Qwen3 takes.

    Its q_proj, k_proj, v_proj, o_proj and, for Qwen3, q_norm and k_norm are the replaced
    module's own; its other parameters have the names and shapes of `NativeSparseAttention`'s,
    but that the gate has a bias.

    Args:
        dense: the module to replace.
        sparsity: the settings.
        rope: tables that all layers share.
        layouts: the layouts that all layers share.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        gates: what the gates start as.
    """

    def __init__(
        self,
        dense: Any,
        sparsity: Sparsity,
        rope: RotaryEmbedding,
        layouts: Layouts,
        dispatcher: Any,
        gates: Gates,
    ) -> None:
        super().__init__()
        config, head_dim = dense.config, dense.head_dim
        self.layer_idx, self.layouts, self.dispatcher = dense.layer_idx, layouts, dispatcher
        self.sparsity, self.softmax_scale = sparsity, dense.scaling
        self.num_q_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = self.v_head_dim = head_dim
        self.rotary_emb = rope
        self.q_proj, self.k_proj, self.v_proj = dense.q_proj, dense.k_proj, dense.v_proj
        self.o_proj = dense.o_proj
        for branch in sparsity.kv_branches[1:]:
            for name, own in zip(PROJECTIONS[branch], PROJECTIONS["selected"], strict=True):
                setattr(self, name, copy.deepcopy(getattr(dense, own)))
        self.q_norm, self.k_norm = getattr(dense, "q_norm", None), getattr(dense, "k_norm", None)
        like = dense.o_proj.weight
        where = {
            "device": like.device,
            "dtype": like.dtype if like.is_floating_point() else torch.get_default_dtype(),
        }
        units = sparsity.gate_units(head_dim)
        gate = constant_gate(config.hidden_size, self.num_q_heads, gates, sparsity.on, units)
        self.gate = gate.to(**where)
        self.add_compression(**where)

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
            packed = Packed.of(cu_seq_lens_q.to(torch.int32), x.shape[1])
            seen = self.branches(self.heads(x[0]), packed)
            return self.o_proj(self.attend(seen, self.gates(x[0])))[None], None
        layer = None
        if cache is not None:
            layer = layer_of(cache, self.layer_idx, self.sparsity)
            if layer.seen:
                return self._continue(x, layer), None
        layout = self.layouts.of(x, attention_mask)
        rows, packed = layout.pack(x), Packed(layout.cu_seqlens, layout.row, layout.positions)
        heads = self.heads(rows)
        seen = self.branches(heads, packed)
        if layer is not None:
            layer.fill(layout, seen.selected, seen.sliding, heads.compressed, seen.windows)
        return layout.unpack(self.o_proj(self.attend(seen, self.gates(rows)))), None

    def _continue(self, x: Tensor, layer: NSALayer) -> Tensor:
        """New tokens of each row behind cached ones, one after another: [B, T, hidden]."""
        outputs = [self._decode(x[:, token], layer) for token in range(x.shape[1])]
        return torch.stack(outputs, 1)

    @torch.no_grad()
    def _decode(self, x: Tensor, layer: NSALayer) -> Tensor:
        """One new token of each row: [B, hidden] to the same."""
        batch, heads = x.shape[0], self.heads(x)
        store = layer.reserve(batch, layer.seen + 1, heads.selected)
        slots = torch.arange(batch, dtype=torch.int32, device=x.device)
        o = self.decode_heads(heads, self.gates(x), layer.lengths, slots, store)
        layer.lengths, layer.seen = layer.lengths + 1, layer.seen + 1
        return self.o_proj(o)
