"""Other members of the family in a `ToyLlama`: the dense model's weights, attention to blocks.

Both are for training: whole sequences, no cache. Selection has no gradient: queries, keys and
values learn through attention to what was selected.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nsagen.integrations.block_attention import in_one_dtype
from nsagen.model import ToyLlama
from nsagen.model.cache import KVLayerCache
from nsagen.model.forms import Form, select
from nsagen.model.layers import RMSNorm, linear
from nsagen.model.packing import Packed
from nsagen.model.prefill import CachedRows
from nsagen.model.self_attention import SelfAttention
from nsagen.ops import block_selection, index_loss, reference, topk_sparse_attention
from nsagen.ops.compress import compress

from .config import TrainConfig


def attend_in_blocks(model: ToyLlama, form: Form) -> None:
    """Have every layer attend as a parameter-free form does."""
    for layer in model.model.layers:
        layer.self_attn.attend = functools.partial(attend, form)


def attend(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
) -> Tensor:
    """Attention of whole packed sequences to selected blocks: [N, HQ, D].

    Args:
        q: [N, HQ, D]; k, v: [N, HK, D], after rope.
        lengths: tokens of each sequence; key_lengths: the same.
    """
    assert lengths == key_lengths
    q, k, v = cast(tuple[Tensor, Tensor, Tensor], in_one_dtype(q, k, v))
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ends = ends.to(q.device, non_blocking=True)
    kinds = {"compress_type": "avgpool", **form.window_sizes}
    windows, window_ends = compress(k.detach(), None, None, ends, **kinds)
    blocks = select(form, q, windows, ends, window_ends, None, q.shape[-1] ** -0.5)
    return topk_sparse_attention(q, k, v, blocks, form.block_size, ends)


class IndexedAttention(SelfAttention):
    """Attention to the blocks that a learned index ranks first, as in MiniMax-M3.

    The index sees the layer's input as a constant and learns from `index_loss` alone.

    Attributes:
        index_loss: of the last forward pass in training: mean over heads and tokens of
            KL(attention || index) over the selected blocks.
    """

    def __init__(
        self, config: TrainConfig, like: SelfAttention, generator: torch.Generator | None
    ) -> None:
        width, size, heads = config.hidden_size, config.head_dim, config.kv_heads
        super().__init__(width, config.query_heads, heads, size, rope=like.rotary_emb)
        self.load_state_dict(like.state_dict())
        self.index_q_proj, self.index_k_proj = (
            linear(width, dim, config.initializer_range, generator) for dim in (heads * size, size)
        )
        self.index_q_norm, self.index_k_norm = (RMSNorm(size, eps=1e-6) for _ in range(2))
        self.block_size, self.rule = config.block_size, config.msa_rule()
        self.index_loss: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        packed: Packed | CachedRows | None = None,
        cache: KVLayerCache | None = None,
    ) -> Tensor:
        """Attend within each sequence of a packed batch: [N, hidden_size], as x is.

        Args:
            x: [N, hidden_size].
            cu_seqlens: int32 [batch + 1].
            packed: the layout.
            cache: not there.
        """
        assert isinstance(packed, Packed)
        assert cache is None
        assert packed.remote is None
        q, k, v = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), packed.positions)
        q, k, v = cast(tuple[Tensor, Tensor, Tensor], in_one_dtype(q, k, v))
        index_q, index_k = (
            heads.to(q.dtype) for heads in self._index(x.detach(), packed.positions)
        )
        ends, size = cu_seqlens, self.block_size
        blocks = block_selection(index_q.detach(), index_k.detach(), None, ends, ends, **self.rule)
        if self.training:
            losses = index_loss(q, k, index_q, index_k, blocks, ends, block_size=size)
            self.index_loss = losses.mean()
        return self.o_proj(topk_sparse_attention(q, k, v, blocks, size, ends).flatten(1))

    def _index(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Index queries [N, HK, D] and keys [N, 1, D], after norm and rope."""
        cos, sin = self.rotary_emb.tables(x)
        q = self.index_q_norm(self.index_q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.index_k_norm(self.index_k_proj(x)[:, None])
        return reference.rope(q, cos, sin, positions), reference.rope(k, cos, sin, positions)


def attend_by_index(model: ToyLlama, config: TrainConfig, generator: torch.Generator) -> None:
    """Give every layer an index of its own to select blocks by."""
    for layer in model.model.layers:
        layer.self_attn = IndexedAttention(config, layer.self_attn, generator)


def index_losses(model: nn.Module) -> list[Tensor]:
    """Those of the layers that have an index, in the last forward pass in training."""
    layers = (module for module in model.modules() if isinstance(module, IndexedAttention))
    return [layer.index_loss for layer in layers if layer.index_loss is not None]
