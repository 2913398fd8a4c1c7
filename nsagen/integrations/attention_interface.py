"""`attn_implementation="nsagen"`: sparse attention through Transformers' attention interface.

The interface hands over queries, keys and values after rope. So it serves the members of the
family that need no more: `nsagen.model.forms` in any dense model, named in `config.nsagen`, and
MiniMax-M3, whose index heads `nsagen.integrations.minimax_m3` brings.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from nsagen.integrations.attention_cache import LAYER, remember_cache, remembers_cache
from nsagen.integrations.attention_layout import (
    Layout,
    check_inputs,
    layout_of,
    refuse,
)
from nsagen.integrations.attention_mask import mask_of
from nsagen.integrations.block_attention import attend, dense, in_one_dtype
from nsagen.integrations.narrow_cache import NarrowLayer
from nsagen.integrations.shared_attention import attend_shared, check_placed
from nsagen.model.forms import IMPLEMENTATION, Form, form_of
from nsagen.model.packing import SHARD

SLIDING = "sliding_attention"

LOSSES = "nsagen_index_losses"
"""The name under which a MiniMax-M3 hands its layers what collects their index losses."""

NO_INDEX = object()
"""For models whose layers say nothing of index heads."""


def attention(
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
    """An attention function as Transformers calls it.

    Args:
        module: the attention module of a decoder.
        query: [B, HQ, S, D], after rope.
        key, value: [B, HK, T, D], those of a cache included.
        attention_mask: what `mask_of` made.
        block_indices: in MiniMax-M3, the index heads of a sparse layer, None for a dense one.

    Returns:
        [B, S, HQ, D], and None for the weights, which are never formed.

    Raises:
        InvalidInputError: an input that changes attention in a way that is not computed here.
    """
    layer, losses = kwargs.pop(LAYER, None), kwargs.pop(LOSSES, None)
    keys, values = key, value
    if isinstance(layer, NarrowLayer):
        keys, values = layer.rows("keys"), layer.rows("values")
    elif key.element_size() == 1:
        rule = "of one byte an element needs the cache_dtype that it was made with"
        refuse("a cache", rule, f"{key.dtype} without one", "set it in config.nsagen again")
    shard = kwargs.pop(SHARD, None)
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    if window or not getattr(module, "is_causal", True):
        # Layers within a window, and encoders, stay as they are.
        _check_some_layer_is_sparse(module)
        if shard is not None:
            rule = "needs layers that reach all tokens"
            refuse(SHARD, rule, "one within a window or an encoder's", "use tensor parallel")
        given = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    check_inputs(dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if shard is not None:
        if keys is not key:
            refuse(SHARD, "takes no cache of one byte an element", "one", "leave out cache_dtype")
        q, k, v = in_one_dtype(query, key, value)
        assert isinstance(k, Tensor)
        assert isinstance(v, Tensor)
        return _shared(module, q, k, v, shard, scale, block_indices, losses), None
    sizes = (query.shape[0], query.shape[2], keys.shape[2])
    layout = layout_of(attention_mask, *sizes, query.device)
    ends = (kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
    layout = _with_documents(module, layout, *ends)
    heads = in_one_dtype(query, keys, values)
    if block_indices is None:
        return dense(*heads, layout, scale), None
    if block_indices is not NO_INDEX:
        return block_indices.attend(*heads, layout, scale, losses), None
    form = form_of_module(module)
    if form.cache_dtype is not None and not remembers_cache(module):
        rule = "needs hooks on the model's attention before its first call"
        advice = "call nsagen.integrations.attention_cache.remember_caches(model)"
        refuse("cache_dtype", rule, "none", advice)
    remember_cache(module)
    return attend(form, *heads, layout, scale, layer), None


def _shared(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shard: Any,
    scale: float,
    block_indices: Any,
    losses: Any,
) -> Tensor:
    """[1, S, HQ, D] of the tokens of one rank among several."""
    check_placed(shard)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    ranking: Any = None
    if block_indices is NO_INDEX:
        ranking = form_of_module(module)
    elif block_indices is not None:
        ranking = block_indices.ranking(k, losses)
    return attend_shared(ranking, q, k, v, shard, scale)[None]


def register() -> None:
    """Make the name known to Transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_of)


def form_of_module(module: Any) -> Form:
    """The form that a module's config names."""
    config = module.config
    settings = getattr(config, "nsagen", None)
    if settings is None:
        name = type(config).__name__
        rule = "must name the form and its sizes"
        advice = f'set nsagen={{"form": "infllm_v2"}} in the {name}; see docs/any-model.md'
        refuse(f"{name}.nsagen", rule, "none", advice)
    if not isinstance(settings, Mapping):
        return form_of("config.nsagen", settings)
    return _known_form(json.dumps(dict(settings), sort_keys=True, default=repr))


@functools.lru_cache(maxsize=64)
def _known_form(settings: str) -> Form:
    return form_of("config.nsagen", json.loads(settings))


def _check_some_layer_is_sparse(module: Any) -> None:
    """Refuse a model whose layers all have a window: nothing would be sparse, without a word."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or set(kinds) == {SLIDING}
    if getattr(module, "is_causal", True) and windowed:
        rule = "must be None where all layers have one, for they stay dense"
        came = str(getattr(config, "sliding_window", None))
        advice = "set it to None: sparse layers then reach all tokens; or use sdpa"
        refuse("config.sliding_window", rule, came, advice)


def _with_documents(
    module: Any, layout: Layout, ends: Tensor | None, key_ends: Tensor | None
) -> Layout:
    """The layout of documents that cu_seq_lens_q packs into one row."""
    if ends is None:
        if key_ends is not None:
            refuse("cu_seq_lens_k", "must come with cu_seq_lens_q", "no cu_seq_lens_q", "add it")
        return layout
    for name, given in (("cu_seq_lens_q", ends), ("cu_seq_lens_k", key_ends)):
        if given is not None and not isinstance(given, Tensor):
            rule = "must be a tensor of integers [documents + 1]"
            refuse(name, rule, type(given).__name__, "make it a tensor")
    if key_ends is not None and key_ends is not ends and not torch.equal(key_ends, ends):
        refuse("cu_seq_lens_k", "must equal cu_seq_lens_q", "another", "pass the same")
    lengths = tuple(ends.diff().tolist())
    if layout.key_index is not None and lengths == layout.key_lengths:
        return layout  # position_ids say the same
    if layout.batch != 1 or not layout.whole or layout.key_index is not None:
        rule = "is for one row without cache and padding, and must agree with position_ids"
        refuse(
            "cu_seq_lens_q", rule, f"{layout.batch} rows of {layout.key_lengths}", "leave it out"
        )
    if sum(lengths) != layout.keys or min(lengths, default=0) < 0 or int(ends[0]) != 0:
        rule = f"must run from 0 to {layout.keys} without decreasing"
        refuse("cu_seq_lens_q", rule, str(lengths), "end it with the number of tokens")
    if SLIDING in (getattr(module.config, "layer_types", None) or ()):
        rule = "must come with position_ids that start again: layers with a window know no other"
        refuse("cu_seq_lens_q", rule, "no such position_ids", "add them")
    index = torch.arange(layout.keys, device=layout.device)
    rows = (0,) * len(lengths)
    sizes = (1, layout.queries, layout.keys)
    return Layout(*sizes, index, index, rows, lengths, lengths, layout.device)
