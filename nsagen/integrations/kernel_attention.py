"""A form's attention in an exported package, as Transformers calls it. Needs PyTorch alone.

    register("my_attention", AttentionInterface, AttentionMaskInterface)

Unlike `attn_implementation="nsagen"` it has one form, that of the package's spec, and keeps no
windows: a decoding step pools the keys of the whole cache again. A `config.nsagen` that says
something else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nsagen.integrations.attention_layout import (
    UNFILLED,
    Layout,
    check_inputs,
    layout_of,
    refuse,
)
from nsagen.integrations.block_attention import attend, in_one_dtype
from nsagen.model.forms import Form, form_of

_KNOWN = "nsagen_exported_layout"

Attention = Callable[..., tuple[Tensor, None]]


def attention_of(form: Form) -> Attention:
    """An attention function for Transformers that computes a form."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Sparse attention with the sizes of this package's spec.

        Args:
            module: the attention module of a decoder.
            query: [B, HQ, S, D], after rope; key, value: [B, HK, T, D], with those of a cache.
            attention_mask: SDPA's, bool [B, 1, S, T], or None for whole rows.

        Returns:
            [B, S, HQ, D], and None for the weights, which are never formed.

        Raises:
            InvalidInputError: an input that changes attention in a way that is not computed here.
        """
        check_inputs(dropout, kwargs)
        _check_settings(form, getattr(module, "config", None))
        window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
        if window or not getattr(module, "is_causal", True):
            came = f"a window of {window}" if window else "is_causal False"
            refuse("the layer", "must be causal, without a window", came, "use sdpa for this model")
        if kwargs.get("cu_seq_lens_q") is not None:
            refuse("cu_seq_lens_q", "must be left out", "packed documents", "use one row for each")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layout = layout_of_mask(attention_mask, query, key)
        return attend(form, *in_one_dtype(query, key, value), layout, scale), None

    return attention


def _check_settings(form: Form, config: Any) -> None:
    """Refuse settings of the model's config that are not the package's."""
    settings = getattr(config, "nsagen", None)
    if settings is None:
        return
    given, own = asdict(form_of("config.nsagen", settings)), asdict(form)
    differ = [name for name in own if given[name] != own[name]]
    if differ:
        rule = "must be this package's: " + ", ".join(f"{n} {own[n]}" for n in differ)
        came = ", ".join(f"{n} {given[n]}" for n in differ)
        refuse("config.nsagen", rule, came, "leave it out, or export a spec of these sizes")


def register(name: str, attention: Attention, interface: Any, mask_interface: Any) -> None:
    """Make an attention function known to Transformers, with the mask that it takes.

    Args:
        name: for `attn_implementation`.
        interface: Transformers' AttentionInterface; mask_interface: its AttentionMaskInterface.
    """
    interface.register(name, attention)
    mask_interface.register(name, mask_interface()["sdpa"])


def layout_of_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Layout:
    """The sequences of a call: padding on any side, and a static cache's part that no token fills.

    Args:
        mask: SDPA's, bool [B, 1, S, T]; None: each row is one sequence, all of it real.
        query: [B, HQ, S, D]; key: [B, HK, T, D].

    Raises:
        InvalidInputError: another mask than the causal one with padding.
    """
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        return layout_of(None, batch, queries, keys, query.device)
    known = getattr(mask, _KNOWN, None)
    if known is None:
        real = _real_tokens(mask, batch, queries, keys)
        known = layout_of(real, batch, queries, keys, query.device)
        setattr(mask, _KNOWN, known)  # all layers of a call have the same mask
    return known


def _real_tokens(mask: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """int32 [B, T]: 1 for a token, 0 for padding, `UNFILLED` beyond."""
    if mask.dtype != torch.bool or mask.shape not in {(n, 1, queries, keys) for n in (1, batch)}:
        came = f"{mask.dtype} {list(mask.shape)}"
        advice = "register with this package's register, and pass attention_mask as [batch, tokens]"
        refuse("attention_mask", f"must be bool {[batch, 1, queries, keys]}", came, advice)
    seen = mask[:, 0].expand(batch, -1, -1)
    real = seen[:, -1]  # the last token sees all that are real
    slots = torch.arange(keys, device=mask.device)
    filled = keys if queries == keys else int((real * (slots + 1)).max())
    places = slots[:queries] + filled - queries
    causal = real[:, None] & (slots <= places[:, None])
    of_tokens = real[:, places.clamp(min=0)][:, :, None]  # rows of padding may hold anything
    if filled < queries or bool(((seen != causal) & of_tokens).any()):
        came, advice = "another", "use sdpa for this model or input"
        refuse("the mask", "must be the causal one, with padding", came, advice)
    return real.to(torch.int32).masked_fill(slots >= filled, UNFILLED)
