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
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from nsagen.integrations.attention_cache import (
    LAYER,
    packed_windows,
    remember_cache,
    with_windows,
)
from nsagen.integrations.attention_layout import Layout, layout_of, mask_of, refuse
from nsagen.model.forms import Form, form_of, select, select_step
from nsagen.ops import native_sparse_attention_decode, topk_sparse_attention
from nsagen.ops.compress import compress
from nsagen.runtime import Dispatcher

IMPLEMENTATION = "nsagen"
SLIDING = "sliding_attention"

LOSSES = "nsagen_index_losses"
"""The name under which a MiniMax-M3 hands its layers what collects their index losses."""

NO_INDEX = object()
"""For models whose layers say nothing of index heads."""

IGNORED = {
    "position_ids",  # the model's rope, and the mask, have used them
    "position_embeddings",
    "use_cache",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
    "cache_position",
    "logits_to_keep",
    "sliding_window",  # None here: layers with a window stay dense
    "is_causal",  # not False here
    "max_length_q",
    "max_length_k",
}
"""What models hand on that changes nothing for a layer. All else that is given is refused."""


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
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    if window or not getattr(module, "is_causal", True):
        # Layers within a window, and encoders, stay as they are.
        _check_some_layer_is_sparse(module)
        given = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    _check(dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout = layout_of(attention_mask, query.shape[0], query.shape[2], key.shape[2], query.device)
    ends = (kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
    layout = _with_documents(module, layout, *ends)
    heads = _one_dtype(query, key, value)
    if block_indices is None:
        return dense(*heads, layout, scale), None
    if block_indices is not NO_INDEX:
        return block_indices.attend(*heads, layout, scale, losses), None
    form = _form(module)
    remember_cache(module)
    if form.dense_decode and query.shape[2] == 1 and not layout.whole:
        return dense(*heads, layout, scale), None
    small = [form.dense(tokens) for tokens in layout.key_lengths]
    if all(small):
        return dense(*heads, layout, scale), None
    if not any(small):
        return _sparse(form, *heads, layout, scale, layer), None
    # No two of them have a token in common.
    o = dense(*heads, layout.only(small), scale)
    return o + _sparse(form, *heads, layout.only([not s for s in small]), scale, layer), None


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As SDPA takes them: under autocast, rope may leave queries and keys in float32."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def register() -> None:
    """Make the name known to Transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_of)


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Causal attention of each sequence to all of its tokens: [B, S, HQ, D]."""
    if layout.key_index is None:
        keys = slice(0, layout.keys)
        o = _causal(query, key[:, :, keys], value[:, :, keys], scale)
        return o.transpose(1, 2)
    if layout.step:
        return _dense_steps(query, key, value, layout, scale)
    q = layout.pack_queries(query).transpose(0, 1).split(layout.query_lengths, 1)
    k, v = (layout.pack_keys(t).transpose(0, 1).split(layout.key_lengths, 1) for t in (key, value))
    parts = [_causal(a[None], b[None], c[None], scale)[0] for a, b, c in zip(q, k, v, strict=True)]
    # A sequence at a time: no mask of all queries and keys of a batch.
    packed = (
        torch.cat(parts, 1).transpose(0, 1) if parts else query.new_zeros(0, *query.shape[1::2])
    )
    return layout.unpack(packed)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, HQ, S, D] of queries that are the last of the keys' tokens."""
    new, tokens = q.shape[2], k.shape[2]
    mask = None
    if new not in (1, tokens):
        mask = torch.ones(new, tokens, dtype=torch.bool, device=q.device).tril(tokens - new)
    return functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=new == tokens and new > 1, scale=scale, enable_gqa=True
    )


def _dense_steps(q: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """`dense` of one token a row, by a mask of the real keys."""
    assert layout.key_index is not None
    k, v = key[:, :, : layout.keys], value[:, :, : layout.keys]
    real = torch.zeros(layout.batch * layout.keys, dtype=torch.bool, device=q.device)
    real = real.index_fill(0, layout.key_index, True).view(layout.batch, 1, 1, layout.keys)
    seen = real | ~real.any(-1, keepdim=True)  # a row without tokens: no NaN before it is dropped
    o = functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    return layout.unpack(layout.pack_queries(o))


def _sparse(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    layer: Any,
) -> Tensor:
    """[B, S, HQ, D] of the sequences of a layout, each by its selected blocks."""
    blocks = _selected(form, query, key, layout, scale, layer)
    return chosen(query, key, value, blocks, form.block_size, layout, scale, form.dispatcher)


def _selected(
    form: Form, query: Tensor, key: Tensor, layout: Layout, scale: float, layer: Any
) -> Tensor:
    """The blocks of each query, as `chosen` takes them."""
    if layout.whole:
        k = layout.pack_keys(key).detach()
        windows, window_ends = compress(
            *(k, None, None, layout.cu_seqlens_k),
            compress_type="avgpool",
            kernel_size=form.kernel_size,
            kernel_stride=form.kernel_stride,
            dispatcher=form.dispatcher,
        )
    else:
        kept, counts = _kept_windows(form, key, layout, layer)
        if layout.step:
            places = (layout.positions, layout.slots)
            return select_step(form, query[:, :, 0], kept.transpose(1, 2), *places, scale)
        windows, window_ends = packed_windows(kept, counts, layout)
    q = layout.pack_queries(query)
    return select(form, q, windows, layout.cu_seqlens_q, window_ends, layout.q_start, scale)


def _kept_windows(
    form: Form, key: Tensor, layout: Layout, layer: Any
) -> tuple[Tensor, tuple[int, ...]]:
    """The windows behind a cache, [B, HK, M, D], and how many each row has."""
    if layer is None:
        return with_windows(form, key, layout, None, (0,) * layout.batch)
    return layer.windows_of(form, key, layout), layer.counts


def chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    layout: Layout,
    scale: float,
    dispatcher: Dispatcher | None,
) -> Tensor:
    """Attention of each sequence's queries to the blocks that were selected for them.

    Args:
        query: [B, HQ, S, D]; key, value: [B, HK, >= T, D].
        blocks: int32 [HK or HQ, N, topk] of the packed queries; of B times as many heads where
            rows are merged; in a step [HK or HQ, B, topk].

    Returns:
        [B, S, HQ, D].
    """
    if layout.step:
        graded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
        alike = layout.key_index is None and blocks.shape[0] == key.shape[1]
        if graded or not alike:
            return _gathered_step(query, key, value, blocks, block_size, layout, scale)
        return _chosen_step(query, key, value, blocks, block_size, layout, scale, dispatcher)
    q, k, v = layout.pack_queries(query), layout.pack_keys(key), layout.pack_keys(value)
    repeats = blocks.shape[0] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    more: dict[str, Any] = {"dispatcher": dispatcher}
    if not layout.whole:
        more |= {"cu_seqlens_k": layout.cu_seqlens_k, "q_start": layout.q_start}
    return layout.unpack(
        topk_sparse_attention(q, k, v, blocks, block_size, layout.cu_seqlens_q, scale, **more)
    )


def _chosen_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    layout: Layout,
    scale: float,
    dispatcher: Dispatcher | None,
) -> Tensor:
    """`chosen` of one token a row without padding, by the decoding kernel."""
    q, k, v = query[:, :, 0], key.transpose(1, 2), value.transpose(1, 2)
    o = native_sparse_attention_decode(
        *(q, k, v, blocks, layout.positions, layout.slots),
        q.new_zeros(*q.shape[:2], v.shape[-1]),
        q.new_ones(*q.shape[:2], 3),
        block_size=block_size,
        window_size=0,
        softmax_scale=scale,
        branches=("selected",),
        dispatcher=dispatcher,
    )
    return o[:, None]


def _gathered_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    layout: Layout,
    scale: float,
) -> Tensor:
    """`chosen` of one token a row, with padding, for each query head or with gradients: reads only
    the chosen tokens of the cache."""
    tokens = blocks[..., None] * block_size + torch.arange(block_size, device=query.device)
    tokens = tokens.flatten(-2)  # [R, B, topk * block_size]
    seen = (tokens >= 0) & (tokens <= layout.positions[:, None])
    heads = torch.arange(blocks.shape[0], device=query.device) * key.shape[1] // blocks.shape[0]
    places = layout.places_of(tokens.where(seen, 0))
    taken = (layout.slots.long()[:, None], heads[:, None, None], places)
    q = query[:, :, 0].unflatten(1, (blocks.shape[0], -1)).transpose(0, 1)
    some = seen | ~seen.any(-1, keepdim=True)  # a row without a token: no NaN before it is dropped
    o = functional.scaled_dot_product_attention(
        q, key[taken], value[taken], some[:, :, None], scale=scale
    )
    o = o.transpose(0, 1).flatten(1, 2)
    return o.masked_fill((layout.positions < 0)[:, None, None], 0.0)[:, None]


def _form(module: Any) -> Form:
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


def _check(dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what would change attention."""
    if dropout:
        rule = "must be 0 in training: no weights of attention are dropped"
        refuse("config.attention_dropout", rule, str(dropout), "set it to 0")
    if kwargs.get("output_attentions"):
        rule = "must not be True: the weights are never formed"
        refuse("output_attentions", rule, "True", "leave it out, or use eager attention")
    if kwargs.get("is_causal") is False:
        refuse("is_causal", "must not be False", "False", "use sdpa")
    known = IGNORED | {"cu_seq_lens_q", "cu_seq_lens_k", "output_attentions"}
    strange = [n for n, v in kwargs.items() if n not in known and v is not None and v is not False]
    if strange:
        advice = "leave it out, or use another implementation of attention"
        refuse("inputs", "must not change attention", ", ".join(strange), advice)


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
