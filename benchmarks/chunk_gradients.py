"""Backward time of attention's branches, whole and in two chunks of a sequence, on a GPU.

    python benchmarks/chunk_gradients.py --tokens 65536

Causal work is uneven: the chunk from the front has about a quarter of the compressed branch's. The
chunks read the same keys, so that together they should take about as long as the whole.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from nsagen import ops
from nsagen.bench.measure import milliseconds, require_gpu
from nsagen.bench.shape import Inputs, Shape


def backward_ms(attend: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> float:
    """Median time of the gradients of all tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    o = attend(*leaves)
    do = torch.randn_like(o)
    return milliseconds(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True))


def rows(shape: Shape, tokens: int, device: str = "cuda") -> dict[str, dict[str, float]]:
    """ms of each branch: the whole, the front chunk and the back chunk."""
    x = Inputs.random(shape, tokens, device=device)
    _, topk_idx = x.compressed()
    ends, window_ends = x.cu_seqlens, x.window_cu_seqlens
    windows = (shape.kernel_size, shape.kernel_stride, shape.block_size, shape.topk)
    found: dict[str, dict[str, float]] = {"compressed": {}, "selected": {}, "sliding": {}}
    half = tokens // 2
    for name, first, last in (("whole", 0, tokens), ("front", 0, half), ("back", half, tokens)):
        mine, q = ends.new_tensor([0, last - first]), x.q[first:last]
        start = None if name == "whole" else ends.new_tensor([first])
        chosen = topk_idx[:, first:last].contiguous()
        chunk = {} if start is None else {"q_start": start, "cu_seqlens_k": ends}

        def compressed(q: Tensor, k: Tensor, v: Tensor, mine=mine, start=start) -> Tensor:
            return ops.compressed_attention(q, k, v, *windows, mine, window_ends, q_start=start)[0]

        def selected(q: Tensor, k: Tensor, v: Tensor, chosen=chosen, mine=mine, chunk=chunk):
            return ops.topk_sparse_attention(q, k, v, chosen, shape.block_size, mine, **chunk)

        def sliding(q: Tensor, k: Tensor, v: Tensor, mine=mine, chunk=chunk) -> Tensor:
            return ops.sliding_window_attention(q, k, v, shape.window_size, mine, **chunk)

        found["compressed"][name] = backward_ms(compressed, (q, x.ck, x.cv))
        found["selected"][name] = backward_ms(selected, (q, x.k, x.v))
        found["sliding"][name] = backward_ms(sliding, (q, x.k, x.v))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="of the sequence, e.g. 131072")
    given = parser.parse_args()
    require_gpu("chunk_gradients")
    print(json.dumps(rows(Shape(), given.tokens), indent=1))


if __name__ == "__main__":
    main()
