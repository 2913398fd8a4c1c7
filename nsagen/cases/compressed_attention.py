"""Example calls of compressed attention's forward kernel."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference


def windows_of(workload: Workload, length: int) -> int:
    """Windows that fit a sequence: M = max(0, (L - l) // s + 1)."""
    return max(0, (length - int(workload.kernel_size)) // int(workload.kernel_stride) + 1)


def visible_pairs(workload: Workload, length: int) -> int:
    """Pairs (token, window that it sees) of a sequence; window i is seen from i s + l - 1 on."""
    windows = windows_of(workload, length)
    unseen = int(workload.kernel_size) - 1 + int(workload.kernel_stride) * (windows - 1) / 2
    return int(windows * (length - unseen))


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random q [N, HQ, D], k [N // s, HK, D], v [N // s, HK, Dv]; o and lse poisoned.

    Rows of k and v past the last window hold NaN: a kernel must not let them in.
    """
    dtype = getattr(torch, workload.dtype)
    dim, v_dim = int(workload.head_dim), int(workload.v_head_dim)
    kv_heads, query_heads = sizes.kv_heads, sizes.kv_heads * int(workload.gqa_ratio)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(rows: int, heads: int, size: int) -> torch.Tensor:
        return torch.randn(rows, heads, size, dtype=dtype, device=device, generator=random)

    windows = tuple(windows_of(workload, length) for length in sizes.seqlens)
    capacity = sizes.tokens // int(workload.kernel_stride)
    q = normal(sizes.tokens, query_heads, dim)
    k, v = normal(capacity, kv_heads, dim), normal(capacity, kv_heads, v_dim)
    k[sum(windows) :], v[sum(windows) :] = float("nan"), float("nan")
    cu_seqlens_q = cu_seqlens_of(sizes.seqlens, device)
    cu_seqlens_k = cu_seqlens_of(windows, device)
    o = poisoned((sizes.tokens, query_heads, v_dim), dtype, device)
    lse = poisoned((sizes.tokens, query_heads), torch.float32, device)
    scale = dim**-0.5

    def expected() -> dict[str, torch.Tensor]:
        o, lse = reference.compressed_attention_forward(
            q.double(),
            k.double(),
            v.double(),
            cu_seqlens_q,
            cu_seqlens_k,
            kernel_size=int(workload.kernel_size),
            kernel_stride=int(workload.kernel_stride),
            softmax_scale=scale,
        )
        return {"o": o, "lse": lse}

    pairs = sum(visible_pairs(workload, length) for length in sizes.seqlens)
    return Case(
        args=(q, k, v, cu_seqlens_q, cu_seqlens_k, o, lse, scale),
        outputs={"o": o, "lse": lse},
        expected=expected,
        cost=Cost(
            flops=2 * pairs * query_heads * (dim + v_dim),
            bytes=sum(x.nbytes for x in (q, k, v, o, lse)),
        ),
    )
