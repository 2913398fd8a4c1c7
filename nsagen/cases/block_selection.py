"""Example calls of block selection's kernel, and what may differ in float32."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nsagen.cases.base import Case, Chunk, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.cases.compressed_attention import visible_pairs, windows_of
from nsagen.core.workload import Workload
from nsagen.ops import reference
from nsagen.ops.reference.block_selection import (
    NSA,
    BlockRule,
    Scoring,
    scores_of_blocks,
    select_blocks,
)

NEAR = 1e-4
"""Two scores this close, relatively, may rank either way: float32 exponents are no more exact."""

NEAR_PRODUCTS = 1e-6
"""Two products of vectors this close, in units of their norms, may rank either way."""

LEAST = 1e-34
"""Scores below this are sums of probabilities that float32 flushes to 0."""


def rule_of(workload: Workload) -> BlockRule:
    """The static parameters that selection itself depends on."""
    names = (field for field in BlockRule.__dataclass_fields__)
    return BlockRule(**{name: int(getattr(workload, name)) for name in names})


def scoring_of(workload: Workload) -> Scoring:
    """The form of the workload's scores."""
    return Scoring(*(str(getattr(workload, name)) for name in Scoring.__dataclass_fields__))


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random q [N, HQ, D] and k [N // s, HK, D], and the lse that compressed attention gives.

    Rows of k past the last window hold NaN: a kernel must not let them in.
    """
    dtype = getattr(torch, workload.dtype)
    dim, heads = int(workload.head_dim), sizes.kv_heads * int(workload.gqa_ratio)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)
    windows = tuple(windows_of(workload, length) for length in sizes.seqlens)
    capacity = sizes.tokens // int(workload.kernel_stride)
    chunk, tokens = Chunk.of(sizes, device), sum(sizes.rows)
    q = torch.randn(tokens, heads, dim, dtype=dtype, device=device, generator=random)
    k = torch.randn(capacity, sizes.kv_heads, dim, dtype=dtype, device=device, generator=random)
    k[sum(windows) :] = float("nan")
    offsets = chunk.cu_seqlens_q, cu_seqlens_of(windows, device)
    scoring = scoring_of(workload)
    rows = scoring.rows(heads, sizes.kv_heads)
    topk_idx = poisoned((rows, tokens, int(workload.topk)), torch.int32, device)
    scale = dim**-0.5
    lse: Tensor | None = None
    if scoring.score_norm == "softmax":
        lse = torch.empty(tokens, heads, device=device)
        if not meta:
            lse.copy_(lse_of(workload, q, k, *offsets, scale, chunk.q_start))
    more = () if chunk.q_start is None else (chunk.q_start,)
    pairs = sizes.over_queries(partial(visible_pairs, workload))
    return Case(
        args=(q, k, lse, *offsets, topk_idx, scale, *more),
        outputs={"topk_idx": topk_idx},
        expected=lambda: {
            "topk_idx": expected_blocks(
                *(rule_of(workload), q, k, lse, *offsets, topk_idx, scale, chunk.q_start),
                scoring=scoring,
            )
        },
        cost=Cost(
            flops=2 * pairs * heads * dim,
            bytes=sum(x.nbytes for x in (q, k, lse, topk_idx) if x is not None),
        ),
    )


def lse_of(
    workload: Workload,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    q_start: Tensor | None = None,
) -> Tensor:
    """The compressed attention's log-sum-exp, float32 [N, HQ]."""
    return reference.compressed_lse(
        *(q.float(), k.float(), cu_seqlens_q, cu_seqlens_k),
        kernel_size=int(workload.kernel_size),
        kernel_stride=int(workload.kernel_stride),
        softmax_scale=scale,
        q_start=q_start,
    )


def expected_blocks(
    rule: BlockRule,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    came: Tensor,
    scale: float,
    q_start: Tensor | None = None,
    scoring: Scoring = NSA,
) -> Tensor:
    """The float64 reference's choice, or the kernel's where float32 cannot tell them apart."""
    expected = []
    ends, key_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    firsts = [0] * (len(ends) - 1) if q_start is None else q_start.tolist()
    for seq, first in enumerate(firsts):
        keys = k[key_ends[seq] : key_ends[seq + 1]].double()
        blocks = -(-(first + ends[seq + 1] - ends[seq]) // rule.block_size)
        rows = max(1, (1 << 24) // (q.shape[1] * max(keys.shape[0], blocks, 1)))
        for start in range(ends[seq], ends[seq + 1], rows):
            part = slice(start, min(start + rows, ends[seq + 1]))
            tokens = first - ends[seq] + torch.arange(part.start, part.stop, device=q.device)
            query = q[part].double(), keys, None if lse is None else lse[part].double()
            scores = scores_of_blocks(*query, tokens, blocks, scale, rule, scoring)
            least = LEAST
            if lse is None and keys.shape[0]:  # what rounding leaves of a sum of products near 0
                norms = q[part].double().norm(dim=-1).max() * keys.norm(dim=-1).max()
                least = NEAR_PRODUCTS * norms.item()
            expected.append(allow_near(came[:, part], scores, tokens, rule, least))
    return torch.cat(expected, 1) if expected else torch.empty_like(came)


def allow_near(
    came: Tensor, scores: Tensor, tokens: Tensor, rule: BlockRule, least: float = LEAST
) -> Tensor:
    """The exact choice [HK, C, topk], but `came` in rows that only swap nearly equal blocks.

    Such a row must hold equally many different candidates in ascending order, including all forced
    blocks, and its scores, in order, must be equally near the best ones. Scores that are equal in
    float64 are equal in float32: there only the lower index is right.
    """
    chosen = select_blocks(scores, tokens, rule)
    blocks, own = torch.arange(scores.shape[-1], device=scores.device), tokens // rule.block_size
    forced = (blocks < rule.init_blocks) | (blocks > own[:, None] - rule.local_blocks)
    ranked = scores.masked_fill(forced, float("inf"))

    def sorted_scores(index: Tensor) -> Tensor:
        inside = (index >= 0) & (index <= own[:, None])
        found = ranked.gather(-1, index.clamp(0, scores.shape[-1] - 1).long())
        return found.masked_fill(~inside, float("-inf")).sort(-1, descending=True).values

    best, other = sorted_scores(chosen), sorted_scores(came)
    near = (other - best).abs() <= NEAR * best.abs() + least
    near = (other == best) | (near & best.isfinite())
    step = came.diff(dim=-1)
    ordered = ((step > 0) | (came[..., 1:] == -1)).all(-1)
    as_many = (came >= 0).sum(-1) == (chosen >= 0).sum(-1)
    excused = near.all(-1) & ordered & as_many & (other != best).any(-1)
    return torch.where(excused.unsqueeze(-1), came, chosen)
