"""Attention of a batch of sequences to all of their tokens, or to blocks that a form selects.

Queries, keys and values come after rope, as [B, heads, tokens, D]. Needs PyTorch alone: exported
packages have it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.integrations.attention_layout import Layout, ends_of
from nsagen.integrations.narrow_rows import NarrowRows, Rows, cache_and_scale, taken, widened
from nsagen.model.forms import Form, select, select_step
from nsagen.ops import selected_attention_decode
from nsagen.ops.compress import compress
from nsagen.ops.local_band import attend_selected
from nsagen.runtime import Dispatcher

GROWTH = 1.5
"""Kept windows grow by half, so that a token costs few copies."""


def attend(
    form: Form,
    query: Tensor,
    key: Rows,
    value: Rows,
    layout: Layout,
    scale: float,
    layer: Any = None,
) -> Tensor:
    """Attention of each sequence as a form has it: [B, S, HQ, D].

    Args:
        query: [B, HQ, S, D]; key, value: [B, HK, >= T, D].
        layer: of a cache, which keeps windows; None: all windows are made anew.
    """
    heads = (query, key, value)
    small = [form.dense(tokens) for tokens in layout.key_lengths]
    if form.dense_decode and layout.packed:
        lengths = zip(small, layout.query_lengths, layout.key_lengths, strict=True)
        small = [few or new == 1 < tokens for few, new, tokens in lengths]
    elif form.dense_decode and query.shape[2] == 1 and not layout.whole:
        return dense(*heads, layout, scale)
    if all(small):
        return dense(*heads, layout, scale)
    if not any(small):
        return sparse(form, *heads, layout, scale, layer)
    # No two of them have a token in common.
    o = dense(*heads, layout.only(small), scale)
    return o + sparse(form, *heads, layout.only([not s for s in small]), scale, layer)


def in_one_dtype(q: Tensor, k: Rows, v: Rows) -> tuple[Tensor, Rows, Rows]:
    """As SDPA takes them: under autocast, rope may leave queries and keys in float32."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    k, v = (x if isinstance(x, NarrowRows) else x.to(dtype) for x in (k, v))
    return q.to(dtype), k, v


def dense(query: Tensor, key: Rows, value: Rows, layout: Layout, scale: float) -> Tensor:
    """Causal attention of each sequence to all of its tokens: [B, S, HQ, D]."""
    if layout.key_index is None or layout.step:
        k, v = (widened(x, query.dtype)[:, :, : layout.keys] for x in (key, value))
        if layout.step and layout.key_index is not None:
            return _dense_steps(query, k, v, layout, scale)
        return _causal(query, k, v, scale).transpose(1, 2)
    q = layout.pack_queries(query).transpose(0, 1).split(layout.query_lengths, 1)
    k, v = (
        layout.pack_keys(t, query.dtype).transpose(0, 1).split(layout.key_lengths, 1)
        for t in (key, value)
    )
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


def _dense_steps(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """`dense` of one token a row, by a mask of the real keys."""
    assert layout.key_index is not None
    real = torch.zeros(layout.batch * layout.keys, dtype=torch.bool, device=q.device)
    real = real.index_fill(0, layout.key_index, True).view(layout.batch, 1, 1, layout.keys)
    seen = real | ~real.any(-1, keepdim=True)  # a row without tokens: no NaN before it is dropped
    o = functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    return layout.unpack(layout.pack_queries(o))


def sparse(
    form: Form,
    query: Tensor,
    key: Rows,
    value: Rows,
    layout: Layout,
    scale: float,
    layer: Any,
) -> Tensor:
    """[B, S, HQ, D] of the sequences of a layout, each by its selected blocks."""
    blocks = _selected(form, query, key, layout, scale, layer)
    sizes = (form.block_size, form.local_blocks)
    return chosen(query, key, value, blocks, *sizes, layout, scale, form.dispatcher)


def _selected(
    form: Form, query: Tensor, key: Rows, layout: Layout, scale: float, layer: Any
) -> Tensor:
    """The blocks of each query, as `chosen` takes them."""
    if (layout.whole or layout.packed) and not isinstance(key, NarrowRows):
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
            windows, of_windows = cache_and_scale(kept)
            places = (layout.positions, layout.slots)
            return select_step(form, query[:, :, 0], windows, *places, scale, of_windows)
        windows, window_ends = packed_windows(widened(kept, query.dtype), counts, layout)
    q = layout.pack_queries(query)
    return select(form, q, windows, layout.cu_seqlens_q, window_ends, layout.q_start, scale)


def _kept_windows(
    form: Form, key: Rows, layout: Layout, layer: Any
) -> tuple[Rows, tuple[int, ...]]:
    """The windows behind a cache, [B, HK, M, D], and how many each row has."""
    if layer is None:
        assert isinstance(key, Tensor)
        return with_windows(form, key, layout, None, (0,) * layout.batch)
    return layer.windows_of(form, key, layout), layer.counts


def chosen(
    query: Tensor,
    key: Rows,
    value: Rows,
    blocks: Tensor,
    block_size: int,
    local_blocks: int,
    layout: Layout,
    scale: float,
    dispatcher: Dispatcher | None,
) -> Tensor:
    """Attention of each sequence's queries to the blocks that were selected for them.

    Args:
        query: [B, HQ, S, D]; key, value: [B, HK, >= T, D].
        blocks: int32 [HK or HQ, N, topk] of the packed queries, as block selection writes them; of
            B times as many heads where rows are merged; in a step [HK or HQ, B, topk].
        local_blocks: blocks up to a query's own that are always among them.

    Returns:
        [B, S, HQ, D].
    """
    if layout.step:
        graded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
        alike = layout.key_index is None and blocks.shape[0] == key.shape[1]
        if graded or not alike:
            return _gathered_step(query, key, value, blocks, block_size, layout, scale)
        return _chosen_step(query, key, value, blocks, block_size, layout, scale, dispatcher)
    q = layout.pack_queries(query)
    k, v = (layout.pack_keys(x, query.dtype) for x in (key, value))
    repeats = blocks.shape[0] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    more: dict[str, Any] = {"dispatcher": dispatcher}
    if not layout.whole:
        more |= {"cu_seqlens_k": layout.cu_seqlens_k, "q_start": layout.q_start}
    sizes = (block_size, local_blocks)
    return layout.unpack(
        attend_selected(q, k, v, blocks, *sizes, layout.cu_seqlens_q, scale, **more)
    )


def _chosen_step(
    query: Tensor,
    key: Rows,
    value: Rows,
    blocks: Tensor,
    block_size: int,
    layout: Layout,
    scale: float,
    dispatcher: Dispatcher | None,
) -> Tensor:
    """`chosen` of one token a row without padding, by the decoding kernel."""
    (k, k_scale), (v, v_scale) = cache_and_scale(key), cache_and_scale(value)
    o = selected_attention_decode(
        *(query[:, :, 0], k, v, blocks, layout.positions, layout.slots),
        block_size=block_size,
        softmax_scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
        dispatcher=dispatcher,
    )
    return o[:, None]


def _gathered_step(
    query: Tensor,
    key: Rows,
    value: Rows,
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
    index = (layout.slots.long()[:, None], heads[:, None, None], places)
    k, v = taken(key, index, query.dtype), taken(value, index, query.dtype)
    q = query[:, :, 0].unflatten(1, (blocks.shape[0], -1)).transpose(0, 1)
    some = seen | ~seen.any(-1, keepdim=True)  # a row without a token: no NaN before it is dropped
    o = functional.scaled_dot_product_attention(q, k, v, some[:, :, None], scale=scale)
    o = o.transpose(0, 1).flatten(1, 2)
    return o.masked_fill((layout.positions < 0)[:, None, None], 0.0)[:, None]


def with_windows(
    form: Form, keys: Tensor, layout: Layout, old: Tensor | None, counts: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The windows of each row, the first `counts` of which are in `old`.

    Returns:
        [B, HK, M, D] with room for more, and how many of each row are right.
    """
    batch, heads, _, dim = keys.shape
    lengths = dict(zip(layout.rows, layout.key_lengths, strict=True))
    # A row without new tokens keeps what it has.
    needed = tuple(form.windows(lengths[b]) if b in lengths else counts[b] for b in range(batch))
    room = max(1, *needed)  # an op takes no empty tensor
    kept = old
    if old is not None and old.is_inference() and not torch.is_inference_mode_enabled():
        kept = old = old.clone()
    if old is None or old.shape[2] < room or old.dtype != keys.dtype:
        kept = keys.new_zeros(batch, heads, int(room * GROWTH) if old is not None else room, dim)
        if old is not None:
            kept[:, :, : old.shape[2]] = old
    assert kept is not None
    if layout.key_index is None:
        first = counts[0]
        if needed[0] > first:
            kept[:, :, first : needed[0]] = _means(form, keys[:, :, : layout.keys], first)
        return kept, needed
    pieces = layout.key_index.split(layout.key_lengths)
    for row, piece in zip(layout.rows, pieces, strict=True):
        first = counts[row]
        if needed[row] > first:
            slots = piece[first * form.kernel_stride :] - row * layout.keys
            new = _means(form, keys[row : row + 1].index_select(2, slots), 0)
            kept[row, :, first : needed[row]] = new[0]
    return kept, needed


def _means(form: Form, keys: Tensor, first: int) -> Tensor:
    """[B, HK, M, D] of the windows from number `first` on, in float32 and back."""
    tokens = keys[:, :, first * form.kernel_stride :].detach()
    return tokens.unfold(2, form.kernel_size, form.kernel_stride).float().mean(-1).to(keys.dtype)


def packed_windows(kept: Tensor, counts: tuple[int, ...], layout: Layout) -> tuple[Tensor, Tensor]:
    """Windows as `select` takes them: [M, HK, D], or [M, B * HK, D] where merged, and their ends.

    Args:
        kept: [B, HK, M, D].
        counts: windows of each row.
    """
    if layout.merged:
        merged = kept[:, :, : counts[0]].flatten(0, 1).transpose(0, 1)
        return merged, ends_of(counts[:1], layout.device)
    rows = [kept[row, :, : counts[row]].transpose(0, 1) for row in layout.rows]
    packed = torch.cat(rows) if rows else kept.new_zeros(0, *kept.shape[1::2])
    return packed, ends_of([counts[row] for row in layout.rows], layout.device)
