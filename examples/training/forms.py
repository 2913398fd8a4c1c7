"""InfLLM-V2 in a `ToyLlama`: the dense model's weights, attention to the blocks that it selects."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from nsagen.integrations.block_attention import in_one_dtype
from nsagen.model import ToyLlama
from nsagen.model.forms import Form, select
from nsagen.ops import topk_sparse_attention
from nsagen.ops.compress import compress


def attend_in_blocks(model: ToyLlama, form: Form) -> None:
    """Have every layer attend as a form does; in training alone, without a cache."""
    for layer in model.model.layers:
        layer.self_attn._attend = functools.partial(attend, form)


def attend(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
) -> Tensor:
    """Attention of whole packed sequences to selected blocks: [N, HQ * D].

    Selection has no gradient: q, k and v learn through attention to what was selected.

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
    return topk_sparse_attention(q, k, v, blocks, form.block_size, ends).flatten(1)
