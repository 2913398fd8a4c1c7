"""The mathematics again, in plain form: whole [N, N] masks, loops over windows and
blocks, and sets of tokens. It shares no code with `nsagen.ops.reference`, which it checks, and is
only fit for small sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
"""A few repeatable examples: enough for shapes, fast enough for every run."""

SEQLENS = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum)
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 1), (6, 2)])


@st.composite
def windows_and_blocks(draw: st.DrawFn) -> tuple[int, int, int]:
    """(kernel_size, kernel_stride, block_size) that satisfy the design's divisibility rules."""
    stride = draw(st.sampled_from([1, 2, 3, 4]))
    return stride * draw(st.integers(1, 4)), stride, stride * draw(st.integers(1, 5))


def offsets(seqlens: list[int] | tuple[int, ...]) -> Tensor:
    """int32 cu_seqlens."""
    return torch.tensor([sum(seqlens[:i]) for i in range(len(seqlens) + 1)], dtype=torch.int32)


def window_count(length: int, kernel_size: int, kernel_stride: int) -> int:
    """Counted, not computed: starts whose whole window lies in the sequence."""
    starts = range(0, length, kernel_stride)
    return sum(1 for start in starts if start + kernel_size <= length)


@dataclass
class Packed:
    """Which sequence each packed row belongs to, and its position there."""

    sequence: Tensor
    position: Tensor

    @classmethod
    def of(cls, lengths: list[int]) -> Packed:
        sequence = [b for b, length in enumerate(lengths) for _ in range(length)]
        position = [t for length in lengths for t in range(length)]
        return cls(torch.tensor(sequence, dtype=torch.long), torch.tensor(position).long())


def token_mask(seqlens: list[int], sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[N, N]: same sequence, not in the future, and `sees(t, u)`."""
    rows = Packed.of(seqlens)
    t, u = rows.position[:, None], rows.position[None, :]
    same = rows.sequence[:, None] == rows.sequence[None, :]
    return same & (u <= t) & sees(t, u)


def window_mask(seqlens: list[int], kernel_size: int, kernel_stride: int) -> Tensor:
    """[N, sum M]: same sequence, and the window's last token is not in the future."""
    counts = [window_count(length, kernel_size, kernel_stride) for length in seqlens]
    queries, windows = Packed.of(seqlens), Packed.of(counts)
    same = queries.sequence[:, None] == windows.sequence[None, :]
    last = windows.position * kernel_stride + kernel_size - 1
    return same & (last[None, :] <= queries.position[:, None])


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o [N, HQ, Dv], lse [N, HQ] and probabilities [HQ, N, T]; mask [N, T] or [HQ, N, T].

    Normalised by hand; only for scores that exp can take as they are.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    weights = torch.exp(torch.einsum("nhd,thd->hnt", q, k) * scale) * mask
    total = weights.sum(-1, keepdim=True)
    probabilities = weights / torch.where(total == 0, torch.ones_like(total), total)
    return torch.einsum("hnt,thd->nhd", probabilities, v), total[..., 0].log().T, probabilities


def compress(
    x: Tensor,
    w: Tensor | tuple[Tensor, Tensor] | None,
    pe: Tensor | None,
    seqlens: list[int],
    kernel_size: int,
    stride: int,
) -> Tensor:
    """Window by window, head by head; the kind of weight follows from its shape."""
    rows, start = [], 0
    for length in seqlens:
        for window in range(window_count(length, kernel_size, stride)):
            first = start + window * stride
            heads = []
            for head in range(x.shape[1]):
                tokens = x[first : first + kernel_size, head]
                tokens = tokens if pe is None else tokens + pe[head]
                if w is None:
                    heads.append(sum(tokens) / kernel_size)
                elif isinstance(w, tuple):
                    before = tokens.reshape(-1) @ w[0][head]
                    heads.append((before / (1 + torch.exp(-before))) @ w[1][head])
                elif w.ndim == 2:
                    heads.append(w[head] @ tokens)
                elif w.shape[1] == kernel_size:
                    gates = 1 / (1 + torch.exp(-(tokens * w[head]).sum(-1)))
                    heads.append(2 * sum(gates[:, None] * tokens) / kernel_size)
                else:
                    heads.append(tokens.reshape(-1) @ w[head])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows) if rows else x.new_zeros(0, *x.shape[1:])


def rank(
    scores: list[float], own: int, *, topk: int, init_blocks: int, local_blocks: int
) -> list[int]:
    """Pick blocks one at a time; a later block must be strictly better to be preferred."""
    taken = {j for j in range(own + 1) if j < init_blocks or j > own - local_blocks}
    while len(taken) < min(topk, own + 1):
        best, best_score = -1, -math.inf
        for j in range(own + 1):
            if j not in taken and (best < 0 or scores[j] > best_score):
                best, best_score = j, scores[j]
        taken.add(best)
    return sorted(taken) + [-1] * (topk - len(taken))


def blocks(
    probabilities: Tensor,
    seqlens: list[int],
    kv_heads: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    **rule: int,
) -> Tensor:
    """topk_idx [HK, N, topk] from probabilities [HQ, N, sum M], by counting shared tokens."""
    counts = [window_count(length, kernel_size, kernel_stride) for length in seqlens]
    grouped = probabilities.unflatten(0, (kv_heads, -1)).sum(1).tolist()
    result = []
    for head in range(kv_heads):
        rows, start, first = [], 0, 0
        for length, count in zip(seqlens, counts, strict=True):
            overlap = [
                [
                    len(
                        set(range(i * kernel_stride, i * kernel_stride + kernel_size))
                        & set(range(j * block_size, (j + 1) * block_size))
                    )
                    / kernel_stride
                    for i in range(count)
                ]
                for j in range(length // block_size + 1)
            ]
            for t in range(length):
                p = grouped[head][start + t][first : first + count]
                scores = [sum(a * b for a, b in zip(p, row, strict=True)) for row in overlap]
                rows.append(rank(scores, t // block_size, **rule))
            start, first = start + length, first + count
        result.append(rows)
    return torch.tensor(result, dtype=torch.int32)


def selected_mask(topk_idx: Tensor, seqlens: list[int], block_size: int, group: int) -> Tensor:
    """[HQ, N, N]: the key's block is in the query's set."""
    causal = token_mask(seqlens, lambda t, u: torch.ones(1, dtype=torch.bool))
    key_blocks = (Packed.of(seqlens).position // block_size).tolist()
    chosen = torch.tensor(
        [[[j in set(row) for j in key_blocks] for row in head] for head in topk_idx.tolist()]
    )
    return (chosen & causal).repeat_interleave(group, 0)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: list[int]) -> Tensor:
    """Element by element in pairs (i, i + D/2): a rotation by the angle's complex number."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turn = torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    turned = pairs * turn
    return torch.cat((turned.real, turned.imag), -1)
