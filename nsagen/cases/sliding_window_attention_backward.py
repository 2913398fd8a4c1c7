"""Example calls of sliding-window attention's backward kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nsagen.cases.attention_gradients import gradient_case
from nsagen.cases.base import Case, Chunk, Sizes
from nsagen.cases.sliding_window_attention import attend
from nsagen.cases.sliding_window_attention import make_case as make_forward_case
from nsagen.core.workload import Workload


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """The forward case's q, k and v, random do, and o and lse of a float32 forward pass."""
    forward_case = make_forward_case(workload, sizes, device, seed)
    args: Any = forward_case.args
    q, k, v, cu_seqlens, _, _, scale, *of_chunk = args
    chunk = Chunk.of(sizes, device)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attend(workload, q, k, v, chunk, scale)

    case = gradient_case(
        replace(forward_case, args=args[:7]), (q, k, v), (cu_seqlens,), forward, seed
    )
    more = (None, None, False, *of_chunk) if of_chunk else ()  # no delta and gate; not added
    return replace(case, args=(*case.args, *more))
