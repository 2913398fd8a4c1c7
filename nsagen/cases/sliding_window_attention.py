"""Example calls of sliding-window attention's forward kernel."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Chunk, Cost, Sizes, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference
from nsagen.ops.reference.selected_attention import forced_blocks


def attend(
    workload: Workload,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chunk: Chunk,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's o and lse of a workload's window."""
    window, params = int(workload.window_size), workload.named()
    block_size = int(params.get("block_size", 0))
    if block_size and not params.get("local_blocks"):
        blocks = {"block_size": block_size, "init_blocks": 0, "local_blocks": window // block_size}
        return _forced(q, k, v, chunk, scale, **blocks)
    return reference.sliding_window_attention_forward(
        *(q, k, v, chunk.cu_seqlens_q), window_size=window, softmax_scale=scale, **chunk.named
    )


def _forced(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chunk: Chunk,
    scale: float,
    **blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's o and lse of forced blocks alone."""
    topk_idx = forced_blocks(chunk.positions, **blocks).expand(k.shape[1], -1, -1)
    given = (q, k, v, topk_idx, chunk.cu_seqlens_q)
    size = blocks["block_size"]
    return reference.selected_attention(*given, block_size=size, softmax_scale=scale, **chunk.named)


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random q [N, HQ, D], k [T, HK, D] and v [T, HK, Dv]; o and lse poisoned.

    A workload with forced blocks has their o and lse, too; one with whole blocks alone sees the
    tokens of these, up to a token's own.
    """
    dtype = getattr(torch, workload.dtype)
    dim, v_dim, window = (
        int(n) for n in (workload.head_dim, workload.v_head_dim, workload.window_size)
    )
    kv_heads, query_heads = sizes.kv_heads, sizes.kv_heads * int(workload.gqa_ratio)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(tokens: int, heads: int, size: int) -> torch.Tensor:
        return torch.randn((tokens, heads, size), dtype=dtype, device=device, generator=random)

    chunk, tokens = Chunk.of(sizes, device), sum(sizes.rows)
    q = normal(tokens, query_heads, dim)
    k, v = normal(sizes.tokens, kv_heads, dim), normal(sizes.tokens, kv_heads, v_dim)
    o = poisoned((tokens, query_heads, v_dim), dtype, device)
    lse = poisoned((tokens, query_heads), torch.float32, device)
    scale = dim**-0.5
    names = ("block_size", "init_blocks", "local_blocks")
    blocks = {name: int(getattr(workload, name)) for name in names if workload.pass_ == "forward"}
    forced: dict[str, torch.Tensor] = {}
    if blocks.get("local_blocks"):
        forced["o_forced"] = poisoned(tuple(o.shape), dtype, device)
        forced["lse_forced"] = poisoned(tuple(lse.shape), torch.float32, device)
    more: tuple[torch.Tensor | None, ...] = tuple(chunk.named.values())
    if forced:
        more = (*(more or (None, None)), *forced.values())

    def expected() -> dict[str, torch.Tensor]:
        wide = (q.double(), k.double(), v.double(), chunk, scale)
        o, lse = attend(workload, *wide)
        found = {"o": o, "lse": lse}
        if forced:
            found |= dict(zip(forced, _forced(*wide, **blocks), strict=True))
        return found

    def seen(length: int) -> float:
        """Pairs of a sequence's first tokens and their keys."""
        width = min(length, window)
        return width * (length - (width - 1) / 2)

    pairs = sizes.over_queries(seen)
    return Case(
        args=(q, k, v, chunk.cu_seqlens_q, o, lse, scale, *more),
        outputs={"o": o, "lse": lse, **forced},
        expected=expected,
        cost=Cost(
            flops=2 * pairs * query_heads * (dim + v_dim),
            bytes=sum(x.nbytes for x in (q, k, v, o, lse)),
        ),
    )
