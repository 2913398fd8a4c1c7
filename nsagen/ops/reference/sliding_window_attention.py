"""Attention of each query to itself and the tokens just before it."""

from __future__ import annotations

from torch import Tensor

from nsagen.errors import InvalidInputError
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
) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale q k^T) v over t - window_size < u <= t: window_size tokens, t included.

    Args:
        q: [N, HQ, D], after rope.
        k: [N, HK, D], after rope.
        v: [N, HK, Dv].
        cu_seqlens: int32 [batch + 1].
        window_size: tokens that a query sees, itself among them; at least 1.
        softmax_scale: 1/sqrt(D) unless given.

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

    def keys(first: int, end: int) -> Bounds:
        return first - window_size + 1, end

    def visible(tokens: Tensor, keys: Tensor, *, start: int) -> Tensor:
        ages = tokens.unsqueeze(-1) - keys
        return (ages >= 0) & (ages < window_size)

    scale = scale_of(softmax_scale, q.shape[-1])
    return packed_attention(q, k, v, bounds, bounds, keys=keys, visible=visible, scale=scale)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
) -> Tensor:
    """`sliding_window_attention_forward` without the lse: o [N, HQ, Dv]."""
    o, _ = sliding_window_attention_forward(
        q, k, v, cu_seqlens, window_size=window_size, softmax_scale=softmax_scale
    )
    return o
