"""Masked attention over packed sequences, in chunks of queries: what all branches share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
from torch.utils.checkpoint import checkpoint

from nsagen.ops.reference._checks import first_positions

MAX_SCORES = 1 << 24
"""Most scores (query heads x queries x keys) that are held at once."""

Bounds = tuple[int, int]
Visible = Callable[..., Tensor]
"""(tokens [C], keys [T], *, rows) -> bool, broadcastable to [HK, C, T].

Tokens and keys are positions in their sequence; `rows` is the slice of packed queries.
"""
Keys = Callable[[int, int], Bounds]
"""(first, last + 1) token of a chunk -> (first, last + 1) key that any of them may see."""


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where a tensor is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in their `wide_dtype`."""
    dtype = wide_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)


def contract(equation: str, *tensors: Tensor) -> Tensor:
    """`torch.einsum` in the tensors' own dtype, also where autocast would take a narrow one."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.einsum(equation, *tensors)


def scale_of(softmax_scale: float | None, head_dim: int) -> float:
    """The given softmax scale, or 1/sqrt(head_dim)."""
    return head_dim**-0.5 if softmax_scale is None else softmax_scale


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled products of q [C, HQ, D] and k [T, HK, D]: [HK, G, C, T]."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return contract("chgd,thd->hgct", grouped, k) * scale


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention where `mask` holds; rows that see nothing give 0 and -inf.

    Args:
        q: [C, HQ, D], already upcast, as are k and v.
        k: [T, HK, D].
        v: [T, HK, Dv].
        mask: bool, broadcastable to [HK, C, T].
        scale: of the scores.

    Returns:
        o [C, HQ, Dv] and lse [C, HQ], the natural logarithm.
    """
    scores = scores_of(q, k, scale)
    mask = mask.expand(k.shape[1], q.shape[0], k.shape[0]).unsqueeze(1)
    empty = ~mask.any(-1, keepdim=True)
    # An empty row keeps finite scores until its results are overwritten: a softmax over -inf
    # alone is NaN, there and in its gradient, and would trip checks for NaN in between.
    scores = scores.masked_fill(~mask & ~empty, float("-inf"))
    probabilities = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), float("-inf"))
    o = contract("hgct,thd->chgd", probabilities, v)
    return o.flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def chunks(length: int, scores_a_row: int) -> list[Bounds]:
    """Split `length` queries so that a chunk holds at most MAX_SCORES scores; never no chunk."""
    step = max(1, MAX_SCORES // max(1, scores_a_row))
    return [(lo, min(lo + step, length)) for lo in range(0, max(length, 1), step)]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Sequence[Bounds],
    key_bounds: Sequence[Bounds],
    *,
    keys: Keys,
    visible: Visible,
    scale: float,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every sequence's queries to its own keys, where `visible` allows.

    Args:
        q: [N, HQ, D].
        k: [T, HK, D].
        v: [T, HK, Dv].
        query_bounds: (start, end) of each sequence in q.
        key_bounds: (start, end) of each sequence in k and v.
        keys: the range of keys that a chunk of queries needs.
        visible: the mask of a chunk.
        scale: of the scores.
        q_start: int32 [batch], position of each sequence's first query; 0 unless given.

    Returns:
        o [N, HQ, Dv] in q's dtype, lse [N, HQ] in float32 (float64 for float64 inputs).
    """
    wide_q, wide_k, wide_v = upcast(q, k, v)
    outputs, lses = [], []
    positions = first_positions(q_start, query_bounds)
    for (start, end), (key_start, key_end), position in zip(
        query_bounds, key_bounds, positions, strict=True
    ):
        parts = chunks(end - start, q.shape[1] * (key_end - key_start))
        for lo, hi in parts:
            first, last = keys(position + lo, position + hi)
            last = min(last, key_end - key_start)
            first = max(0, min(first, last))
            rows = slice(start + lo, start + hi)
            piece = functools.partial(
                _attend_chunk,
                visible=functools.partial(visible, rows=rows),
                tokens=torch.arange(position + lo, position + hi, device=q.device),
                keys=torch.arange(first, last, device=q.device),
                scale=scale,
            )
            if len(parts) > 1:
                piece = functools.partial(recomputed, piece)
            columns = slice(key_start + first, key_start + last)
            o, lse = piece(wide_q[rows], wide_k[columns], wide_v[columns])
            outputs.append(o.to(q.dtype))
            lses.append(lse)
    return torch.cat(outputs).contiguous(), torch.cat(lses).contiguous()


def recomputed(piece: Callable[..., Any], *args: Any) -> Any:
    """piece(*args), computed again in the backward pass: kept scores would take memory as N * N.

    The transforms of torch.func refuse recomputation, so they keep the scores.
    """
    if not torch.compiler.is_compiling() and not _saved_tensors_hooks_is_enabled():
        return piece(*args)
    return checkpoint(piece, *args, use_reentrant=False, preserve_rng_state=False)


def _attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Callable[[Tensor, Tensor], Tensor],
    tokens: Tensor,
    keys: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, visible(tokens, keys), scale)
