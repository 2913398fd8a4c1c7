"""Selection of the key blocks that matter most to a query, by compressed attention's mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._attend import chunks, scale_of, scores_of, upcast
from nsagen.ops.reference._checks import check_heads, check_windows, sequence_bounds


@dataclass(frozen=True)
class BlockRule:
    """The static parameters of block selection.

    Attributes:
        kernel_size: tokens of a window, l.
        kernel_stride: tokens between the starts of two windows, s.
        block_size: tokens of a block, B.
        topk: blocks to take in all.
        init_blocks: blocks at the start that are always taken.
        local_blocks: blocks up to the query's own that are always taken.
    """

    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int

    def __post_init__(self) -> None:
        check_windows("block_selection", self.kernel_size, self.kernel_stride)
        if self.block_size < 1 or self.block_size % self.kernel_stride:
            raise InvalidInputError(
                f"block_selection: block_size must be a positive multiple of kernel_stride; got "
                f"block_size={self.block_size}, kernel_stride={self.kernel_stride}; "
                f"use e.g. block_size={4 * self.kernel_stride}"
            )
        forced = self.init_blocks + self.local_blocks
        if min(self.init_blocks, self.local_blocks) < 0 or self.topk < max(1, forced):
            raise InvalidInputError(
                f"block_selection: topk must be positive and at least init_blocks + local_blocks, "
                f"neither negative; got topk={self.topk}, init_blocks={self.init_blocks}, "
                f"local_blocks={self.local_blocks}; raise topk or force fewer blocks"
            )


def overlap_weights(rule: BlockRule) -> tuple[int, list[int]]:
    """Tokens that windows share with a block, in units of kernel_stride.

    Window i is [i*s, i*s + l), block j is [j*B, (j+1)*B). Their overlap depends only on
    r = i - j*B/s, and is positive for r in -(l/s - 1) .. B/s - 1.

    Returns:
        The first r, and the weight of each r from there on; for 32/16/64: -1, [1, 2, 2, 2, 1].
    """
    width, step = rule.kernel_size // rule.kernel_stride, rule.block_size // rule.kernel_stride
    return 1 - width, [min(r + width, step) - max(r, 0) for r in range(1 - width, step)]


def block_scores(probabilities: Tensor, blocks: int, rule: BlockRule) -> Tensor:
    """score[j] = sum over windows i of probabilities[i] * overlap(i, j) / s.

    Args:
        probabilities: [..., M], summed over the heads of a group.
        blocks: blocks to score.
        rule: the static parameters.

    Returns:
        [..., blocks].
    """
    first, weights = overlap_weights(rule)
    step = rule.block_size // rule.kernel_stride
    after = max(0, blocks * step + first + len(weights) - probabilities.shape[-1])
    padded = functional.pad(probabilities, (-first, after))
    # One window of every block at a time, first to last: all blocks add in the same order, so
    # that blocks with equal probabilities tie exactly. A matrix product does not promise that.
    score = probabilities.new_zeros(*probabilities.shape[:-1], blocks)
    for offset, weight in enumerate(weights):
        score = score + weight * padded[..., offset::step][..., :blocks]
    return score


def select_blocks(scores: Tensor, tokens: Tensor, rule: BlockRule) -> Tensor:
    """The forced blocks and the best of the rest, `topk` in all; the lower index wins a tie.

    Args:
        scores: [HK, C, blocks].
        tokens: [C] positions of the queries; blocks 0 .. tokens // block_size are candidates.
        rule: the static parameters.

    Returns:
        int32 [HK, C, topk]: ascending block indices, then -1.
    """
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    own = (tokens // rule.block_size).unsqueeze(-1)
    forced = (blocks < rule.init_blocks) | (blocks > own - rule.local_blocks)
    # Below every score, not zero: a future block must not tie with a visible one that got no mass.
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(blocks > own, float("-inf"))
    best = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., : rule.topk]
    none = scores.shape[-1]
    best = best.masked_fill(best > own, none).sort(-1).values
    best = best.masked_fill(best == none, -1)
    return functional.pad(best, (0, rule.topk - best.shape[-1]), value=-1).to(torch.int32)


def scores_of_blocks(
    q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, blocks: int, scale: float, rule: BlockRule
) -> Tensor:
    """How much probability some queries of one sequence give to its blocks.

    Args:
        q: [C, HQ, D], upcast, as are k and lse.
        k: [M, HK, D], the sequence's compressed keys.
        lse: [C, HQ].
        tokens: [C] positions of the queries.
        blocks: blocks of the sequence.
        scale: of the scores.
        rule: the static parameters.

    Returns:
        [HK, C, blocks].
    """
    ends = torch.arange(k.shape[0], device=q.device) * rule.kernel_stride + rule.kernel_size - 1
    grouped_lse = lse.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0).unsqueeze(-1)
    probabilities = (scores_of(q, k, scale) - grouped_lse).exp()
    probabilities = probabilities.masked_fill(ends > tokens.unsqueeze(-1), 0.0).sum(1)
    return block_scores(probabilities, blocks, rule)


def blocks_of(
    q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, blocks: int, scale: float, rule: BlockRule
) -> Tensor:
    """The blocks of some queries of one sequence; see `scores_of_blocks` for the arguments.

    Returns:
        int32 [HK, C, topk].
    """
    return select_blocks(scores_of_blocks(q, k, lse, tokens, blocks, scale, rule), tokens, rule)


@torch.no_grad()
def block_selection(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """Choose each query's blocks, per key/value head, from the compressed attention's scores.

    score[t, j] = sum over the group's heads h and windows i of p[h, t, i] overlap(i, j) / s, with
    p = exp(softmax_scale q k - lse). Candidates: j <= t // block_size. Always taken:
    j < init_blocks and j > t // block_size - local_blocks.

    Args:
        q: [N, HQ, D].
        k: compressed keys [T, HK, D]; rows past cu_seqlens_k[-1] are not read.
        lse: [N, HQ], natural logarithm, from the compressed attention.
        cu_seqlens_q: int32 [batch + 1].
        cu_seqlens_k: int32 [batch + 1], offsets of the compressed sequences.
        softmax_scale: 1/sqrt(D) unless given.
        q_start: int32 [batch], position of each sequence's first query, for a chunk of a longer
            prompt; 0 unless given.

    Returns:
        int32 [HK, N, topk]: ascending block indices within the sequence, then -1.
    """
    rule = BlockRule(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    check_heads("block_selection", q, k, k)
    query_bounds = sequence_bounds("block_selection", cu_seqlens_q, q.shape[0])
    key_bounds = sequence_bounds("block_selection", cu_seqlens_k, k.shape[0], spare=True)
    scale = scale_of(softmax_scale, q.shape[-1])
    q, k, lse = upcast(q, k, lse)
    firsts = [0] * len(query_bounds) if q_start is None else q_start.tolist()
    selected = []
    for (start, end), (key_start, key_end), first in zip(
        query_bounds, key_bounds, firsts, strict=True
    ):
        blocks = -(-(first + end - start) // block_size)
        for lo, hi in chunks(end - start, q.shape[1] * max(key_end - key_start, blocks)):
            rows = slice(start + lo, start + hi)
            tokens = first + torch.arange(lo, hi, device=q.device)
            keys = k[key_start:key_end]
            selected.append(blocks_of(q[rows], keys, lse[rows], tokens, blocks, scale, rule))
    return torch.cat(selected, 1)
