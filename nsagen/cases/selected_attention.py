"""Example calls of selected attention's forward kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsagen.cases.base import Case, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference

TOPK, INIT_BLOCKS, LOCAL_BLOCKS = 16, 1, 2
"""The choice of blocks in NSA's paper (arXiv 2502.11089, section 4.1)."""


@dataclass(frozen=True)
class Inputs:
    """What both passes take."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    topk_idx: torch.Tensor
    cu_seqlens: torch.Tensor
    block_size: int
    softmax_scale: float
    pairs: int
    """(query, key) pairs of one query head."""

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Poisoned o [N, HQ, Dv] and lse [N, HQ]."""
        shape, device = (*self.q.shape[:2], self.v.shape[2]), self.q.device
        return poisoned(shape, self.q.dtype, device), poisoned(shape[:2], torch.float32, device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's o and lse of these q, k and v."""
        return reference.selected_attention(
            q,
            k,
            v,
            self.topk_idx,
            self.cu_seqlens,
            block_size=self.block_size,
            softmax_scale=self.softmax_scale,
        )


def make_inputs(
    workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0
) -> Inputs:
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

    forced, any_order = (INIT_BLOCKS, LOCAL_BLOCKS), sizes.any_order
    if workload.pass_ == "forward" and workload.local_blocks:
        forced = (int(workload.init_blocks), int(workload.local_blocks))
        any_order = False  # the list is as block selection writes it
    topk_idx = random_blocks(sizes, block_size, device, random, forced)
    if any_order:
        topk_idx = in_any_order(topk_idx, seed)
    return Inputs(
        normal(query_heads, dim),
        normal(kv_heads, dim),
        normal(kv_heads, v_dim),
        topk_idx,
        cu_seqlens_of(sizes.seqlens, device),
        block_size,
        dim**-0.5,
        sum(keys_seen(length, block_size) for length in sizes.seqlens),
    )


def make_case(
    workload: Workload,
    sizes: Sizes,
    device: torch.device | str,
    seed: int = 0,
    topk_idx: torch.Tensor | None = None,
) -> Case:
    """A call on random inputs, with the given blocks where there are any.

    A workload with forced blocks gets what attention to them gave, too.
    """
    x = make_inputs(workload, sizes, device, seed)
    if topk_idx is not None:
        x = replace(x, topk_idx=topk_idx)
    o, lse = x.outputs()
    more = ()
    if workload.local_blocks:
        more = (
            None,
            None,
            *_forced_result(x, int(workload.init_blocks), int(workload.local_blocks)),
        )

    def expected() -> dict[str, torch.Tensor]:
        o, lse = x.attend(x.q.double(), x.k.double(), x.v.double())
        return {"o": o, "lse": lse}

    tensors = (x.q, x.k, x.v, x.topk_idx, o, lse)
    return Case(
        args=(x.q, x.k, x.v, x.topk_idx, x.cu_seqlens, o, lse, x.softmax_scale, *more),
        outputs={"o": o, "lse": lse},
        expected=expected,
        cost=Cost(
            flops=2 * x.pairs * x.q.shape[1] * (x.q.shape[2] + x.v.shape[2]),
            bytes=sum(tensor.nbytes for tensor in tensors),
        ),
    )


def _forced_result(
    x: Inputs, init_blocks: int, local_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of attention to the forced blocks alone, in the dtypes of the outputs."""
    if x.q.is_meta:
        return x.outputs()
    o, lse = reference.forced_blocks_attention(
        *(x.q.double(), x.k.double(), x.v.double(), x.cu_seqlens),
        block_size=x.block_size,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        softmax_scale=x.softmax_scale,
    )
    return o.to(x.q.dtype), lse.float()


def random_blocks(
    sizes: Sizes,
    block_size: int,
    device: torch.device | str,
    random: torch.Generator | None,
    forced: tuple[int, int] = (INIT_BLOCKS, LOCAL_BLOCKS),
) -> torch.Tensor:
    """int32 [HK, N, TOPK]: initial and local blocks and random others; ascending, then -1."""
    parts = [torch.empty((sizes.kv_heads, 0, TOPK), dtype=torch.int32, device=device)]
    for length in sizes.seqlens:
        for start in range(0, length, 4096):  # bounds the memory for the scores
            t = torch.arange(start, min(start + 4096, length), device=device)[:, None]
            blocks = -(-length // block_size)
            parts.append(_chosen(t, sizes.kv_heads, blocks, block_size, random, forced))
    return torch.cat(parts, 1)


def _chosen(
    t: torch.Tensor,
    heads: int,
    blocks: int,
    block_size: int,
    random: torch.Generator | None,
    forced: tuple[int, int],
) -> torch.Tensor:
    init_blocks, local_blocks = forced
    own = t // block_size
    block = torch.arange(max(blocks, TOPK), device=t.device)
    scores = torch.rand((heads, t.shape[0], block.shape[0]), device=t.device, generator=random)
    scores = scores.masked_fill((block < init_blocks) | (block > own - local_blocks), 2.0)
    scores = scores.masked_fill(block > own, -1.0)
    best = scores.topk(TOPK, dim=-1)
    none = torch.iinfo(torch.int32).max
    picked = best.indices.masked_fill(best.values < 0, none).sort(-1).values
    return picked.masked_fill(picked == none, -1).to(torch.int32)


def in_any_order(topk_idx: torch.Tensor, seed: int) -> torch.Tensor:
    """Block indices rewritten as callers may write them.

    A quarter of the entries repeat another entry of their row, a tenth name no block (-1, negative
    or past any sequence), and each row is shuffled.
    """
    random = torch.Generator().manual_seed(seed)
    shape, entries = topk_idx.shape, topk_idx.cpu()
    drawn = torch.rand(shape, generator=random)
    other = torch.randint(shape[-1], shape, generator=random)
    entries = torch.where(drawn < 0.25, entries.gather(-1, other), entries)
    strays = torch.tensor([-1, -7, -(2**31), 2**27, 2**31 - 1], dtype=entries.dtype)
    stray = strays[torch.randint(len(strays), shape, generator=random)]
    entries = torch.where(drawn > 0.9, stray, entries)
    order = torch.rand(shape, generator=random).argsort(-1)
    return entries.gather(-1, order).to(topk_idx.device)


def keys_seen(length: int, block_size: int) -> int:
    """How many (query, key) pairs of one head a sequence of this length has."""
    seen = 0
    for own in range(-(-length // block_size)):
        tokens = min(block_size, length - own * block_size)
        whole = min(own, TOPK - 1) * block_size
        seen += tokens * whole + tokens * (tokens + 1) // 2
    return seen
