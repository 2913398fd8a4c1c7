"""`paged|nsagen`: the forms of `nsagen.model.forms` in Transformers' continuous batching.

Its cache hands out the keys and values of all of a request's tokens, packed with those of other
requests, and keeps nothing else. So each pass makes the windows of its requests anew, and members
of the family that need more than keys and values cannot run in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from nsagen.integrations.attention_interface import IMPLEMENTATION, NO_INDEX, form_of_module
from nsagen.integrations.attention_layout import Layout, check_inputs, refuse
from nsagen.integrations.block_attention import attend

PAGED = f"paged|{IMPLEMENTATION}"

OF_A_PASS = {
    "logits_indices",
    "logits_processor_args",
    "block_table",
    "max_seqlen_q",
    "max_seqlen_k",
}
"""What a pass hands on that changes nothing for a layer."""


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    block_indices: Any = NO_INDEX,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as continuous batching calls it.

    Args:
        module: the attention module of a decoder.
        query: [1, HQ, S, D], after rope, of several requests, one after another.
        key, value: [1, HK, S, D], the same tokens'.
        kwargs: the cache, where it has and gets keys, and `cu_seq_lens_q` and `cu_seq_lens_k`.

    Returns:
        [1, S, HQ, D], and None for the weights, which are never formed.

    Raises:
        InvalidInputError: not called by continuous batching, or for a layer that needs more than
            the keys and values of all tokens.
    """
    if kwargs.get("cache") is None:
        advice = f'set attn_implementation="{IMPLEMENTATION}"'
        refuse("a pass", "must be one of continuous batching", "no paged cache", advice)
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    if window:
        came = f"a window of {window}"
        refuse("a layer", "must reach all tokens in continuous batching", came, "use sdpa")
    if block_indices is not NO_INDEX:
        came, advice = "index heads, whose keys its cache cannot hold", "use model.generate"
        refuse("a layer", "must need keys and values alone", came, advice)
    form = form_of_module(module)
    if form.cache_dtype is not None:
        rule, advice = "is for nsagen's own layers of a cache", "leave it out"
        refuse("cache_dtype", rule, form.cache_dtype, advice)
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        advice = "set use_cuda_graph=False in the ContinuousBatchingConfig"
        refuse("a pass", "must read lengths on the host", "a CUDA graph's capture", advice)
    cache, places = kwargs.pop("cache"), (kwargs.pop("read_index"), kwargs.pop("write_index"))
    ends = (kwargs.pop("cu_seq_lens_q"), kwargs.pop("cu_seq_lens_k"))
    if not isinstance(ends[1], Tensor):
        came = f"layers of {', '.join(ends[1])}"
        refuse("a model", "must have layers of one kind in continuous batching", came, "use sdpa")
    check_inputs(dropout, {name: x for name, x in kwargs.items() if name not in OF_A_PASS})
    keys, values = cache.update(key, value, module.layer_idx, *places)
    k, v = (x.transpose(0, 1)[None] for x in (keys, values))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout = _layout_of(*ends, query.shape[2], keys.shape[0])
    return attend(form, query, k, v, layout, scale), None


def register() -> None:
    """Make the name known to Transformers."""
    AttentionInterface.register(PAGED, paged_attention)


def _layout_of(ends: Tensor, key_ends: Tensor, queries: int, keys: int) -> Layout:
    """The requests of a pass, which may be followed by padding."""
    known = getattr(ends, "nsagen_layout", None)
    if known is None:
        lengths: list[list[int]] = torch.stack((ends, key_ends)).diff().tolist()
        some = [(new, held) for new, held in zip(*lengths, strict=True) if new]
        new, held = tuple(n for n, _ in some), tuple(h for _, h in some)
        device, rows = ends.device, (0,) * len(some)
        places = [torch.arange(sum(of), device=device) for of in (held, new)]
        sizes = (1, queries, keys)
        known = Layout(*sizes, places[0], places[1], rows, held, new, device, packed=True)
        ends.nsagen_layout = known  # type: ignore[attr-defined]  # all layers of a pass have it
    return known
