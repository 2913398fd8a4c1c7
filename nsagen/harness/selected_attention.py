"""Example calls of selected attention's forward kernel."""

from __future__ import annotations

import torch

from nsagen.harness.base import Case, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.ops import reference
from nsagen.workload import Workload

TOPK, INIT_BLOCKS, LOCAL_BLOCKS = 16, 1, 2
"""The choice of blocks in NSA's paper (arXiv 2502.11089, section 4.1)."""


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random q [N, HQ, D], k [N, HK, D] and v [N, HK, Dv], and blocks as selection gives them."""
    dtype = getattr(torch, workload.dtype)
    dim, v_dim, block_size = (
        int(n) for n in (workload.head_dim, workload.v_head_dim, workload.block_size)
    )
    kv_heads, query_heads = sizes.kv_heads, sizes.kv_heads * int(workload.gqa_ratio)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(heads: int, size: int) -> torch.Tensor:
        shape = (sizes.tokens, heads, size)
        return torch.randn(shape, dtype=dtype, device=device, generator=random)

    q, k, v = normal(query_heads, dim), normal(kv_heads, dim), normal(kv_heads, v_dim)
    topk_idx = random_blocks(sizes, block_size, device, random)
    cu_seqlens = cu_seqlens_of(sizes.seqlens, device)
    o = poisoned((sizes.tokens, query_heads, v_dim), dtype, device)
    lse = poisoned((sizes.tokens, query_heads), torch.float32, device)
    scale = dim**-0.5

    def expected() -> dict[str, torch.Tensor]:
        o, lse = reference.selected_attention(
            q.double(),
            k.double(),
            v.double(),
            topk_idx,
            cu_seqlens,
            block_size=block_size,
            softmax_scale=scale,
        )
        return {"o": o, "lse": lse}

    seen = sum(keys_seen(length, block_size) for length in sizes.seqlens)
    return Case(
        args=(q, k, v, topk_idx, cu_seqlens, o, lse, scale),
        outputs={"o": o, "lse": lse},
        expected=expected,
        cost=Cost(
            flops=2 * seen * query_heads * (dim + v_dim),
            bytes=sum(x.nbytes for x in (q, k, v, topk_idx, o, lse)),
        ),
    )


def random_blocks(
    sizes: Sizes, block_size: int, device: torch.device | str, random: torch.Generator | None
) -> torch.Tensor:
    """int32 [HK, N, TOPK]: initial and local blocks and random others; ascending, then -1."""
    parts = [torch.empty((sizes.kv_heads, 0, TOPK), dtype=torch.int32, device=device)]
    for length in sizes.seqlens:
        for start in range(0, length, 4096):  # bounds the memory that the scores take
            t = torch.arange(start, min(start + 4096, length), device=device)[:, None]
            parts.append(_chosen(t, sizes.kv_heads, -(-length // block_size), block_size, random))
    return torch.cat(parts, 1)


def _chosen(
    t: torch.Tensor, heads: int, blocks: int, block_size: int, random: torch.Generator | None
) -> torch.Tensor:
    own = t // block_size
    block = torch.arange(max(blocks, TOPK), device=t.device)
    scores = torch.rand((heads, t.shape[0], block.shape[0]), device=t.device, generator=random)
    scores = scores.masked_fill((block < INIT_BLOCKS) | (block > own - LOCAL_BLOCKS), 2.0)
    scores = scores.masked_fill(block > own, -1.0)
    best = scores.topk(TOPK, dim=-1)
    none = torch.iinfo(torch.int32).max
    picked = best.indices.masked_fill(best.values < 0, none).sort(-1).values
    return picked.masked_fill(picked == none, -1).to(torch.int32)


def keys_seen(length: int, block_size: int) -> int:
    """How many (query, key) pairs of one head a sequence of this length has."""
    seen = 0
    for own in range(-(-length // block_size)):
        tokens = min(block_size, length - own * block_size)
        whole = min(own, TOPK - 1) * block_size
        seen += tokens * whole + tokens * (tokens + 1) // 2
    return seen
