"""Time every op on this GPU, beside its least possible time.

    python benchmarks/ops.py --seqlens 4096 16384 65536

The floor is the larger of the op's matrix operations at the GPU's measured matrix rate
and its bytes at the measured copy rate; both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import KV_HEADS, milliseconds, target_name, workload_of, write_results
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsagen.codegen.build import build_variant
from nsagen.codegen.compile import load_module
from nsagen.harness.base import Sizes, harness_of

FORWARD_OPS = (
    "compress",
    "rope",
    "compressed_attention",
    "block_selection",
    "selected_attention",
    "sliding_window_attention",
    "gated_sum",
)
DECODE_OPS = ("cache_append", "compressed_attention", "native_sparse_attention")


def ceilings() -> tuple[float, float]:
    """(FLOP/s of a large bfloat16 matrix product, bytes/s of a large copy), measured now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3
    source = torch.empty(1 << 31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return flops, 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def time_op(op: str, pass_: str, sizes: Sizes, rates: tuple[float, float]) -> dict[str, Any]:
    """One row: the default schedule's time beside the op's floor."""
    workload = workload_of(op, pass_)
    with tempfile.TemporaryDirectory() as folder:
        module = load_module(build_variant(workload, target_name(), Path(folder)))
        case = harness_of(workload).make_case(workload, sizes, "cuda")
        ms = milliseconds(lambda: module.launch(*case.args))
    return {
        "op": op,
        "pass": pass_,
        "tokens": sizes.tokens if pass_ == "forward" else sizes.capacity,
        "rows": len(sizes.seqlens),
        "ms": ms,
        "floor_ms": 1e3 * max(case.cost.flops / rates[0], case.cost.bytes / rates[1]),
        "tflops": case.cost.flops / ms / 1e9,
        "tb_per_s": case.cost.bytes / ms / 1e9,
    }


def dense_attention(tokens: int, rates: tuple[float, float]) -> dict[str, Any]:
    """cuDNN's causal attention through PyTorch on the same heads; it calibrates the day's clock."""
    q = torch.randn(1, 16 * KV_HEADS, tokens, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn_like(q[:, :KV_HEADS]) for _ in range(2))

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    ms = milliseconds(call)
    flops = 2 * tokens**2 * q.shape[1] * q.shape[3]
    size = 2 * (2 * q.numel() + k.numel() + v.numel())
    return {
        "op": "dense attention (cuDNN)",
        "pass": "forward",
        "tokens": tokens,
        "rows": 1,
        "ms": ms,
        "floor_ms": 1e3 * max(flops / rates[0], size / rates[1]),
        "tflops": flops / ms / 1e9,
        "tb_per_s": size / ms / 1e9,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = ("tokens", "rows", "ms", "floor", "TFLOP/s", "TB/s")
    print(f"{'op':26}{'pass':9}" + "".join(f"{name:>10}" for name in columns))
    for row in rows:
        print(
            f"{row['op']:26}{row['pass']:9}{row['tokens']:>10}{row['rows']:>10}{row['ms']:>10.4f}"
            f"{row['floor_ms']:>10.4f}{row['tflops']:>10.1f}{row['tb_per_s']:>10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--seqlens", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    add("--contexts", type=int, nargs="*", default=[4096, 32768], help="decode: tokens in cache")
    add("--batches", type=int, nargs="*", default=[1, 32], help="decode: rows")
    args = parser.parse_args()
    rates = ceilings()
    print(f"matrix product {rates[0] / 1e12:.0f} TFLOP/s, copy {rates[1] / 1e12:.2f} TB/s")
    rows = []
    for tokens in args.seqlens:
        rows.append(dense_attention(tokens, rates))
        rows += [time_op(op, "forward", Sizes((tokens,), KV_HEADS), rates) for op in FORWARD_OPS]
    for context in args.contexts:
        for batch in args.batches:
            sizes = Sizes((context - 1,) * batch, KV_HEADS, capacity=context)
            rows += [time_op(op, "decode", sizes, rates) for op in DECODE_OPS]
    print_table(rows)
    write_results("ops", rows)


if __name__ == "__main__":
    main()
