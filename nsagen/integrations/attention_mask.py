"""The mask that Transformers gives to layers with nsagen's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from nsagen.integrations.attention_layout import UNFILLED, refuse


def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What the layers of a call get as their mask.

    Returns:
        int32 [B, T]: 0 for padding, `UNFILLED`, else the number of the token's document in its
        row, from 1; None if each row is one sequence without padding. For layers that attend
        within a window: SDPA's own mask.

    Raises:
        InvalidInputError: a token would see later ones, or not all earlier ones of its document.
    """
    if local_size is not None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            **kwargs,
        )
    if kwargs.get("use_vmap"):
        came, advice = "a mask function", "use sdpa for this model"
        refuse("the model", "must add nothing to the causal mask", came, advice)
    static = isinstance(q_offset, Tensor) or q_offset + q_length < kv_length
    documents = None
    if mask_function is not causal_mask_function:
        documents = _documents(mask_function, batch_size, q_length, q_offset, device)
    if attention_mask is None and documents is None and not static:
        return None
    real = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    if attention_mask is not None:
        given = attention_mask[:, :kv_length].to(torch.int32)
        so_far = q_offset + q_length  # a static cache has keys beyond these
        if given.shape[1] < so_far:
            rule, came = f"must cover all {int(so_far)} tokens", f"{given.shape[1]}"
            refuse("attention_mask", rule, came, "add those that the cache holds")
        real[:, : given.shape[1]] = given
    if documents is not None:
        real = real * documents
    if static:
        slots = torch.arange(kv_length, device=device)
        real = real.masked_fill(slots >= q_offset + q_length, UNFILLED)
    elif documents is None and bool(real.all()):
        return None
    return real


def sees_next(
    mask_function: Callable[..., Any], batch: int, tokens: int, offset: Any, device: Any
) -> Tensor:
    """bool [B, S - 1]: where a token sees the one after it, as those of an image do."""
    rows, head, queries = _places(batch, tokens, offset, device)
    return torch.as_tensor(mask_function(rows, head[:, 1:], queries[:, :-1], queries[:, 1:]))


def _places(batch: int, tokens: int, offset: Any, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, 1], heads and queries [1, S], as a mask function takes them."""
    queries = (torch.arange(tokens, device=device) + offset)[None]
    return torch.arange(batch, device=device)[:, None], torch.zeros_like(queries), queries


def _documents(
    mask_function: Callable[..., Any], batch: int, tokens: int, offset: Any, device: Any
) -> Tensor | None:
    """int32 [B, S], the number of each token's document; None if each row is one.

    Transformers composes the mask of a call from functions of (row, head, query, key). Those of
    packed documents end between two neighbours of which the later does not see the earlier.
    """
    if tokens > 1 and bool(sees_next(mask_function, batch, tokens, offset, device).any()):
        came, advice = "tokens that see later ones", "use sdpa for this model or input"
        refuse("the mask", "must be causal", came, advice)
    rows, head, queries = _places(batch, tokens, offset, device)
    same = torch.as_tensor(mask_function(rows, head[:, 1:], queries[:, 1:], queries[:, :-1]))
    same = same.expand(batch, tokens - 1)
    if bool(same.all()):
        return None
    first = torch.ones(batch, 1, dtype=torch.int32, device=same.device)
    return torch.cat([first, (~same).to(torch.int32)], 1).cumsum(1, dtype=torch.int32)
