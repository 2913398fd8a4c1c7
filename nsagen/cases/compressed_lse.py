"""Example calls of the kernel that computes compressed attention's log-sum-exp alone."""

from __future__ import annotations

import torch

from nsagen.cases.base import Case, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.cases.compressed_attention import visible_pairs, windows_of
from nsagen.core.workload import Workload
from nsagen.ops import reference


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random q [N, HQ, D] and k [N // s, HK, D]; lse poisoned.

    Rows of k past the last window hold NaN: a kernel must not let them in.
    """
    dtype, dim = getattr(torch, workload.dtype), int(workload.head_dim)
    heads = sizes.kv_heads * int(workload.gqa_ratio)
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)
    windows = tuple(windows_of(workload, length) for length in sizes.seqlens)
    capacity = sizes.tokens // int(workload.kernel_stride)
    q = torch.randn(sizes.tokens, heads, dim, dtype=dtype, device=device, generator=random)
    k = torch.randn(capacity, sizes.kv_heads, dim, dtype=dtype, device=device, generator=random)
    k[sum(windows) :] = float("nan")
    offsets = cu_seqlens_of(sizes.seqlens, device), cu_seqlens_of(windows, device)
    lse = poisoned((sizes.tokens, heads), torch.float32, device)
    scale = dim**-0.5

    def expected() -> dict[str, torch.Tensor]:
        found = reference.compressed_lse(
            *(q.double(), k.double(), *offsets),
            kernel_size=int(workload.kernel_size),
            kernel_stride=int(workload.kernel_stride),
            softmax_scale=scale,
        )
        return {"lse": found}

    pairs = sum(visible_pairs(workload, length) for length in sizes.seqlens)
    return Case(
        args=(q, k, *offsets, lse, scale),
        outputs={"lse": lse},
        expected=expected,
        cost=Cost(flops=2 * pairs * heads * dim, bytes=sum(x.nbytes for x in (q, k, lse))),
    )
