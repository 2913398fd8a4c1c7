"""Attention of each query to itself and the tokens just before it."""

from __future__ import annotations

from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._attend import Bounds, packed_attention, scale_of
from nsagen.ops.reference._checks import check_heads, sequence_bounds


def sliding_window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    window_size: int,
    softmax_scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale q k^T) v over t - window_size < u <= t: window_size tokens, t included.

    Args:
        q: [N, HQ, D], after rope.
        k: [R, HK, D], after rope; R is N unless cu_seqlens_k says otherwise.
        v: [R, HK, Dv].
        cu_seqlens: int32 [batch + 1].
        window_size: tokens that a query sees, itself among them; at least 1.
        softmax_scale: 1/sqrt(D) unless given.
        cu_seqlens_k: int32 [batch + 1], offsets of the keys, where a sequence has more of them than
            queries; cu_seqlens unless given.
        q_start: int32 [batch], position of each sequence's first query among its keys; 0 unless
            given.

    Returns:
        o [N, HQ, Dv] in q's dtype and lse [N, HQ], natural logarithm.
    """
    where = "sliding_window_attention"
    check_heads(where, q, k, v)
    if window_size < 1:
        raise InvalidInputError(
            f"{where}: window_size must be at least 1, as it counts the query's own token; got "
            f"{window_size}; pass the number of tokens to see"
        )
    bounds = sequence_bounds(where, cu_seqlens, q.shape[0])
    key_bounds = sequence_bounds(
        where, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, k.shape[0]
    )

    def keys(first: int, end: int) -> Bounds:
        return first - window_size + 1, end

    def visible(tokens: Tensor, keys: Tensor, *, rows: slice) -> Tensor:
        ages = tokens.unsqueeze(-1) - keys
        return (ages >= 0) & (ages < window_size)

    scale = scale_of(softmax_scale, q.shape[-1])
    return packed_attention(
        q, k, v, bounds, key_bounds, keys=keys, visible=visible, scale=scale, q_start=q_start
    )


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """`sliding_window_attention_forward` without the lse: o [N, HQ, Dv]."""
    o, _ = sliding_window_attention_forward(
        q,
        k,
        v,
        cu_seqlens,
        window_size=window_size,
        softmax_scale=softmax_scale,
        cu_seqlens_k=cu_seqlens_k,
        q_start=q_start,
    )
    return o
