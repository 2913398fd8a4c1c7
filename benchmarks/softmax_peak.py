"""What a softmax that scales last costs: float16, which needs it, beside bfloat16, which does not.

    python benchmarks/softmax_peak.py --out softmax_peak.json

Kernels of both dtypes move the same bytes and multiply at the same rate. They differ in how a
probability is formed, p = exp2((s - peak) scale) or exp2(s scale - peak); selected attention's
backward pass is another algorithm in float16, two passes without shares of dq. One sequence has
16384 tokens, 64 query heads of 128 over 4. Medians of 20 calls that take dtypes in turns, in ms.
Meant for 40 seconds on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nsagen import ops

TOKENS, HEADS, KV_HEADS, DIM, ROUNDS = 16384, 64, 4, 128, 20
DTYPES = (torch.bfloat16, torch.float16)


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """An output that requires gradients, by op."""
    random = torch.Generator("cuda").manual_seed(0)

    def normal(tokens: int, heads: int) -> Tensor:
        shape = (tokens, heads, DIM)
        return torch.randn(shape, dtype=dtype, device="cuda", generator=random).requires_grad_()

    windows = (TOKENS - 32) // 16 + 1
    q, k, v = normal(TOKENS, HEADS), normal(TOKENS, KV_HEADS), normal(TOKENS, KV_HEADS)
    ck, cv = normal(windows, KV_HEADS), normal(windows, KV_HEADS)
    ends, window_ends = (torch.tensor([0, n], dtype=torch.int32).cuda() for n in (TOKENS, windows))
    rule = (32, 16, 64, 16, ends, window_ends, TOKENS, windows)
    topk_idx = ops.compressed_attention(q, ck, cv, *rule)[1]
    return {
        "compressed_attention": lambda: ops.compressed_attention(q, ck, cv, *rule)[0],
        "topk_sparse_attention": lambda: ops.topk_sparse_attention(q, k, v, topk_idx, 64, ends),
        "sliding_window_attention": lambda: ops.sliding_window_attention(q, k, v, 512, ends),
    }


def timed(call: Callable[[], Tensor]) -> tuple[float, float]:
    """Milliseconds of a call and of its backward pass."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    marks[0].record()
    o = call()
    marks[1].record()
    o.backward(torch.ones_like(o))
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("softmax_peak.json"))
    out = parser.parse_args().out
    of_dtype, rows = {dtype: calls(dtype) for dtype in DTYPES}, []
    for op in of_dtype[DTYPES[0]]:
        taken: dict[torch.dtype, list[tuple[float, float]]] = {dtype: [] for dtype in DTYPES}
        for turn in range(ROUNDS + 3):
            for dtype in DTYPES:
                times = timed(of_dtype[dtype][op])
                taken[dtype] += [times] if turn >= 3 else []
        for place, pass_ in enumerate(("forward", "backward")):
            plain, last = (statistics.median(t[place] for t in taken[d]) for d in DTYPES)
            rows.append({"op": op, "pass": pass_, "bfloat16_ms": plain, "float16_ms": last})
            print(f"{op:26} {pass_:8} {plain:8.3f} {last:8.3f} {last / plain:6.2f}", flush=True)
            out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
