"""Selection of the key blocks that matter most to a query, in all forms of one formula.

score[t, r, j] = POOL over windows i touching block j, visible, of RED over heads h in r of
NORM(scale q[t, h] . k[i]); `Scoring` names NORM, RED and POOL, and its defaults are NSA's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._attend import chunks, scale_of, scores_of, upcast
from nsagen.ops.reference._checks import (
    check_heads,
    check_windows,
    first_positions,
    sequence_bounds,
)
from nsagen.ops.reference.quantize import first_values


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


SCORE_NORMS = ("softmax", "none")
SCORE_HEADS = ("sum", "each")
SCORE_POOLS = ("overlap", "max")


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become scores of blocks.

    Attributes:
        score_norm: "softmax": a head's probabilities over the windows that it sees; "none": the
            products as they are. These are not scaled, which would change no choice.
        score_heads: "sum": one selection per key head, from the sum over its query heads; "each":
            one per query head.
        score_pool: "overlap": a block's windows weighted by the tokens that they share with it;
            "max": the largest of them.
    """

    score_norm: str = "softmax"
    score_heads: str = "sum"
    score_pool: str = "overlap"

    def __post_init__(self) -> None:
        allowed = {
            "score_norm": SCORE_NORMS,
            "score_heads": SCORE_HEADS,
            "score_pool": SCORE_POOLS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InvalidInputError(
                    f"block_selection: {name} must be one of {', '.join(values)}; got "
                    f"{getattr(self, name)!r}; choose one of these"
                )
        if (self.score_norm, self.score_pool) == ("none", "overlap"):
            raise InvalidInputError(
                "block_selection: score_pool 'overlap' needs score_norm 'softmax'; got score_norm "
                "'none', whose sums would rank blocks by how many windows they touch; "
                "use score_pool='max'"
            )

    def rows(self, query_heads: int, key_heads: int) -> int:
        """Selections a token: one per query head, or one per key head."""
        return query_heads if self.score_heads == "each" else key_heads


NSA = Scoring()


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


def block_maxima(values: Tensor, blocks: int, rule: BlockRule, empty: float) -> Tensor:
    """score[j] = the largest value of the windows that share a token with block j.

    Args:
        values: [..., M].
        blocks: blocks to score.
        rule: the static parameters.
        empty: the score of a block that no window touches.

    Returns:
        [..., blocks].
    """
    first, weights = overlap_weights(rule)
    step = rule.block_size // rule.kernel_stride
    after = max(0, blocks * step + first + len(weights) - values.shape[-1])
    padded = functional.pad(values, (-first, after), value=empty)
    score = values.new_full((*values.shape[:-1], blocks), empty)
    for offset in range(len(weights)):
        score = torch.maximum(score, padded[..., offset::step][..., :blocks])
    return score


def select_blocks(scores: Tensor, tokens: Tensor, rule: BlockRule) -> Tensor:
    """The forced blocks and the best of the rest, `topk` in all; the lower index wins a tie.

    Args:
        scores: [R, C, blocks], of R selections a query.
        tokens: [C] positions of the queries; blocks 0 .. tokens // block_size are candidates.
        rule: the static parameters.

    Returns:
        int32 [R, C, topk]: ascending block indices, then -1.
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
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    tokens: Tensor,
    blocks: int,
    scale: float,
    rule: BlockRule,
    scoring: Scoring = NSA,
) -> Tensor:
    """The scores that some queries of one sequence give to its blocks.

    Args:
        q: [C, HQ, D], upcast, as are k and lse.
        k: [M, HK, D], the sequence's compressed keys.
        lse: [C, HQ]; None with score_norm "none". Where it is -inf, all scores are 0.
        tokens: [C] positions of the queries.
        blocks: blocks of the sequence.
        scale: of the products under a softmax.
        rule: the static parameters.
        scoring: the form of the scores.

    Returns:
        [HK, C, blocks], or [HQ, C, blocks] with score_heads "each". A block none of whose windows
        is visible scores 0 with a softmax, else -inf.
    """
    ends = torch.arange(k.shape[0], device=q.device) * rule.kernel_stride + rule.kernel_size - 1
    hidden = ends > tokens.unsqueeze(-1)
    if lse is None:
        empty = float("-inf")
        values = scores_of(q, k, 1.0).masked_fill(hidden, empty)
    else:
        empty = 0.0
        grouped_lse = lse.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0).unsqueeze(-1)
        values = (scores_of(q, k, scale) - grouped_lse).exp()
        values = values.masked_fill(hidden | grouped_lse.isneginf(), empty)
    values = values.flatten(0, 1) if scoring.score_heads == "each" else values.sum(1)
    if scoring.score_pool == "max":
        return block_maxima(values, blocks, rule, empty)
    return block_scores(values, blocks, rule)


def blocks_of(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    tokens: Tensor,
    blocks: int,
    scale: float,
    rule: BlockRule,
    scoring: Scoring = NSA,
) -> Tensor:
    """The blocks of some queries of one sequence; see `scores_of_blocks` for the arguments.

    Returns:
        int32 [HK, C, topk], or [HQ, C, topk] with score_heads "each".
    """
    scores = scores_of_blocks(q, k, lse, tokens, blocks, scale, rule, scoring)
    return select_blocks(scores, tokens, rule)


@torch.no_grad()
def block_selection(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
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
    score_norm: str = "softmax",
    score_heads: str = "sum",
    score_pool: str = "overlap",
) -> Tensor:
    """Choose each query's blocks by the scores of one formula; by default NSA's.

    score[t, r, j] = POOL over windows i touching block j, visible, of RED over heads h in r of
    NORM(q[t, h] . k[i]); see `Scoring`. Candidates: j <= t // block_size. Always taken:
    j < init_blocks and j > t // block_size - local_blocks. Equal scores: the lower index.

    Args:
        q: [N, HQ, D].
        k: compressed keys [T, HK, D], or index keys, windows of one token; rows past
            cu_seqlens_k[-1] are not read.
        lse: [N, HQ], natural logarithm, of the products under a softmax; None with score_norm
            "none".
        cu_seqlens_q: int32 [batch + 1].
        cu_seqlens_k: int32 [batch + 1], offsets of the compressed sequences.
        softmax_scale: 1/sqrt(D) unless given; with score_norm "none" it changes no choice.
        q_start: int32 [batch], position of each sequence's first query, for a chunk of a longer
            prompt; 0 unless given.
        score_norm, score_heads, score_pool: see `Scoring`.

    Returns:
        int32 [HK, N, topk], or [HQ, N, topk] with score_heads "each": ascending block indices
        within the sequence, then -1.
    """
    rule = BlockRule(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    scoring = Scoring(score_norm, score_heads, score_pool)
    check_lse("block_selection", lse, score_norm)
    check_heads("block_selection", q, k, k)
    query_bounds = sequence_bounds("block_selection", cu_seqlens_q, q.shape[0])
    key_bounds = sequence_bounds("block_selection", cu_seqlens_k, k.shape[0], spare=True)
    scale = scale_of(softmax_scale, q.shape[-1])
    q, k = upcast(q, k)
    firsts = first_positions(q_start, query_bounds)
    selected = []
    for (start, end), (key_start, key_end), first in zip(
        query_bounds, key_bounds, firsts, strict=True
    ):
        blocks = -(-(first + end - start) // block_size)
        for lo, hi in chunks(end - start, q.shape[1] * max(key_end - key_start, blocks)):
            rows = slice(start + lo, start + hi)
            tokens = first + torch.arange(lo, hi, device=q.device)
            keys, part = k[key_start:key_end], None if lse is None else lse[rows].to(q.dtype)
            selected.append(blocks_of(q[rows], keys, part, tokens, blocks, scale, rule, scoring))
    return torch.cat(selected, 1)


def check_lse(op: str, lse: Tensor | None, score_norm: str) -> None:
    """A softmax needs its log-sum-exp, and nothing else takes one."""
    if (lse is None) == (score_norm == "softmax"):
        came = f"lse {'None' if lse is None else tuple(lse.shape)}, score_norm {score_norm!r}"
        raise InvalidInputError(
            f"{op}: lse must be given with score_norm 'softmax' and with no other; got {came}; "
            "take it from compressed_lse, or leave it out"
        )


@torch.no_grad()
def block_selection_decode(
    q: Tensor,
    k_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    score_norm: str = "softmax",
    score_heads: str = "sum",
    score_pool: str = "overlap",
    k_scale: Tensor | None = None,
) -> Tensor:
    """Block selection of one new token a row; a softmax is exact, whatever it is in prefill.

    Args:
        q: [R, HQ, D], as in `block_selection`.
        k_cache: [slots, max_windows, HK, D], compressed keys or index keys.
        positions: int32 [R], position of the new token; -1: an idle row.
        slots: int32 [R], each row's place in the cache.
        softmax_scale: 1/sqrt(D) unless given; with score_norm "none" it changes no choice.
        block_table: int32 [slots, max_pages]: the cache is [pages, windows a page, HK, D].
        score_norm, score_heads, score_pool: see `Scoring`.
        k_scale: of k_cache's rows, if that is of a narrow dtype; see `quantize`.

    Returns:
        int32 [HK, R, topk], or [HQ, R, topk] with score_heads "each"; -1 for idle rows.
    """
    rule = BlockRule(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    scoring = Scoring(score_norm, score_heads, score_pool)
    check_heads("block_selection decode", q, k_cache[0], k_cache[0])
    scale = scale_of(softmax_scale, q.shape[-1])
    rows = scoring.rows(q.shape[1], k_cache.shape[2])
    topk_idx = positions.new_full((rows, q.shape[0], topk), -1, dtype=torch.int32)
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        if position < 0:
            continue
        one, token = slice(row, row + 1), torch.full((1,), position, device=q.device)
        windows = max(0, (position + 1 - kernel_size) // kernel_stride + 1)
        query, keys = upcast(q[one], first_values(k_cache, k_scale, block_table, slot, windows))
        lse = None
        if score_norm == "softmax":
            lse = torch.logsumexp(scores_of(query, keys, scale), -1).permute(2, 0, 1).flatten(1)
        blocks = position // block_size + 1
        topk_idx[:, one] = blocks_of(query, keys, lse, token, blocks, scale, rule, scoring)
    return topk_idx


@torch.no_grad()
def compressed_lse(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """The log-sum-exp of softmax_scale q k^T over the windows i with i * s + l - 1 <= t.

    It normalizes the scores of `block_selection`: exactly with the same compressed keys, nearly
    with the means of longer windows, four times as far apart, which cost a quarter.

    Args:
        q: [N, HQ, D].
        k: compressed keys [T, HK, D]; rows past cu_seqlens_k[-1] are not read.
        cu_seqlens_q: int32 [batch + 1].
        cu_seqlens_k: int32 [batch + 1], offsets of the compressed sequences.
        kernel_size: tokens of a window of k, l.
        kernel_stride: tokens between the starts of two windows of k, s.
        softmax_scale: 1/sqrt(D) unless given.
        q_start: int32 [batch], position of each sequence's first query; 0 unless given.

    Returns:
        [N, HQ], natural logarithm, in float32 (float64 for float64 inputs); -inf where no window
        is visible.
    """
    where = "compressed_lse"
    check_windows(where, kernel_size, kernel_stride)
    check_heads(where, q, k, k)
    query_bounds = sequence_bounds(where, cu_seqlens_q, q.shape[0])
    key_bounds = sequence_bounds(where, cu_seqlens_k, k.shape[0], spare=True)
    scale = scale_of(softmax_scale, q.shape[-1])
    q, k = upcast(q, k)
    firsts = first_positions(q_start, query_bounds)
    found = []
    for (start, end), (key_start, key_end), first in zip(
        query_bounds, key_bounds, firsts, strict=True
    ):
        ends = torch.arange(key_end - key_start, device=q.device) * kernel_stride + kernel_size - 1
        for lo, hi in chunks(end - start, q.shape[1] * (key_end - key_start)):
            tokens = first + torch.arange(lo, hi, device=q.device)
            scores = scores_of(q[start + lo : start + hi], k[key_start:key_end], scale)
            scores = scores.masked_fill(ends > tokens.unsqueeze(-1), float("-inf"))
            found.append(torch.logsumexp(scores, -1).permute(2, 0, 1).flatten(1, 2))
    return torch.cat(found).contiguous()
