"""Example calls of sliding-window attention's forward kernel."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference


def attend(
    workload: Workload,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's o and lse of a workload's window."""
    window, params = int(workload.window_size), workload.named()
    block_size = int(params.get("block_size", 0))
    if block_size and not params.get("local_blocks"):
        blocks = {"block_size": block_size, "init_blocks": 0, "local_blocks": window // block_size}
        return reference.forced_blocks_attention(q, k, v, cu_seqlens, **blocks, softmax_scale=scale)
    return reference.sliding_window_attention_forward(
        q, k, v, cu_seqlens, window_size=window, softmax_scale=scale
    )


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random q [N, HQ, D], k [N, HK, D] and v [N, HK, Dv]; o and lse poisoned.

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

    def normal(heads: int, size: int) -> torch.Tensor:
        shape = (sizes.tokens, heads, size)
        return torch.randn(shape, dtype=dtype, device=device, generator=random)

    q, k, v = normal(query_heads, dim), normal(kv_heads, dim), normal(kv_heads, v_dim)
    cu_seqlens = cu_seqlens_of(sizes.seqlens, device)
    o = poisoned((sizes.tokens, query_heads, v_dim), dtype, device)
    lse = poisoned((sizes.tokens, query_heads), torch.float32, device)
    scale = dim**-0.5
    names = ("block_size", "init_blocks", "local_blocks")
    blocks = {name: int(getattr(workload, name)) for name in names if workload.pass_ == "forward"}
    forced: dict[str, torch.Tensor] = {}
    if blocks.get("local_blocks"):
        forced["o_forced"] = poisoned(tuple(o.shape), dtype, device)
        forced["lse_forced"] = poisoned(tuple(lse.shape), torch.float32, device)
    more = (None, None, *forced.values()) if forced else ()

    def expected() -> dict[str, torch.Tensor]:
        o, lse = attend(workload, q.double(), k.double(), v.double(), cu_seqlens, scale)
        found = {"o": o, "lse": lse}
        if forced:
            wide = (q.double(), k.double(), v.double(), cu_seqlens)
            results = reference.forced_blocks_attention(*wide, **blocks, softmax_scale=scale)
            found |= dict(zip(forced, results, strict=True))
        return found

    widths = [(length, min(length, window)) for length in sizes.seqlens]
    seen = sum(width * (length - (width - 1) / 2) for length, width in widths)
    return Case(
        args=(q, k, v, cu_seqlens, o, lse, scale, *more),
        outputs={"o": o, "lse": lse, **forced},
        expected=expected,
        cost=Cost(
            flops=2 * seen * query_heads * (dim + v_dim),
            bytes=sum(x.nbytes for x in (q, k, v, o, lse)),
        ),
    )
