"""Example calls of selected attention's forward kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsagen.cases.base import Case, Chunk, Cost, Sizes, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference
from nsagen.ops.reference.selected_attention import forced_blocks

INIT_BLOCKS, LOCAL_BLOCKS = 1, 2
"""The forced blocks in NSA's paper (arXiv 2502.11089, section 4.1)."""


@dataclass(frozen=True)
class Inputs:
    """What both passes take."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    topk_idx: torch.Tensor
    chunk: Chunk
    block_size: int
    softmax_scale: float
    pairs: int
    """(query, key) pairs of one query head."""

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return self.chunk.cu_seqlens_q

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
            **self.chunk.named,
        )


def make_inputs(
    workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0
) -> Inputs:
    """Random q [N, HQ, D], k [T, HK, D] and v [T, HK, Dv], and blocks as selection gives them."""
    dtype = getattr(torch, workload.dtype)
    dim, v_dim, block_size = (
        int(n) for n in (workload.head_dim, workload.v_head_dim, workload.block_size)
    )
    kv_heads, query_heads = sizes.kv_heads, sizes.kv_heads * int(workload.gqa_ratio)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(tokens: int, heads: int, size: int) -> torch.Tensor:
        shape = (tokens, heads, size)
        return torch.randn(shape, dtype=dtype, device=device, generator=random)

    forced, any_order = (INIT_BLOCKS, LOCAL_BLOCKS), sizes.any_order
    if workload.pass_ == "forward" and workload.local_blocks:
        forced = (int(workload.init_blocks), int(workload.local_blocks))
        any_order = False  # the list is as block selection writes it
    topk_idx = random_blocks(sizes, block_size, device, random, forced)
    if any_order:
        topk_idx = in_any_order(topk_idx, seed)
    return Inputs(
        normal(sum(sizes.rows), query_heads, dim),
        normal(sizes.tokens, kv_heads, dim),
        normal(sizes.tokens, kv_heads, v_dim),
        topk_idx,
        Chunk.of(sizes, device),
        block_size,
        dim**-0.5,
        pairs_of(sizes, block_size),
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
    more = tuple(x.chunk.named.values())
    if workload.local_blocks:
        more = (
            *(more or (None, None)),
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
    blocks = {"init_blocks": init_blocks, "local_blocks": local_blocks}
    forced = forced_blocks(x.chunk.positions, block_size=x.block_size, **blocks)
    forced = replace(x, topk_idx=forced.expand(x.k.shape[1], -1, -1))
    o, lse = forced.attend(x.q.double(), x.k.double(), x.v.double())
    return o.to(x.q.dtype), lse.float()


def random_blocks(
    sizes: Sizes,
    block_size: int,
    device: torch.device | str,
    random: torch.Generator | None,
    forced: tuple[int, int] = (INIT_BLOCKS, LOCAL_BLOCKS),
) -> torch.Tensor:
    """int32 [HK, N, topk]: initial and local blocks and random others; ascending, then -1."""
    heads, topk = sizes.kv_heads, sizes.topk
    if torch.device(device).type == "meta":
        return torch.empty((heads, sum(sizes.rows), topk), dtype=torch.int32, device=device)
    parts = [torch.empty((heads, 0, topk), dtype=torch.int32, device=device)]
    for length, rows in zip(sizes.seqlens, sizes.rows, strict=True):
        for start in range(length - rows, length, 4096):  # bounds the memory for the scores
            t = torch.arange(start, min(start + 4096, length), device=device)[:, None]
            blocks = max(-(-length // block_size), topk)
            parts.append(_chosen(t, (heads, blocks, topk), block_size, random, forced))
    return torch.cat(parts, 1)


def _chosen(
    t: torch.Tensor,
    sizes: tuple[int, int, int],
    block_size: int,
    random: torch.Generator | None,
    forced: tuple[int, int],
) -> torch.Tensor:
    (heads, blocks, topk), (init_blocks, local_blocks) = sizes, forced
    own = t // block_size
    block = torch.arange(blocks, device=t.device)
    scores = torch.rand((heads, t.shape[0], block.shape[0]), device=t.device, generator=random)
    scores = scores.masked_fill((block < init_blocks) | (block > own - local_blocks), 2.0)
    scores = scores.masked_fill(block > own, -1.0)
    best = scores.topk(topk, dim=-1)
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


def pairs_of(sizes: Sizes, block_size: int) -> int:
    """How many (query, key) pairs of one head a call has."""

    def up_to(length: int) -> int:
        seen = 0
        for own in range(-(-length // block_size)):
            tokens = min(block_size, length - own * block_size)
            whole = min(own, sizes.topk - 1) * block_size
            seen += tokens * whole + tokens * (tokens + 1) // 2
        return seen

    return sizes.over_queries(up_to)
