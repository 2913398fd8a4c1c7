"""Attention of a decode step with few rows: candidate schedules beside the defaults.

    python benchmarks/short_decode.py --out "$OUT" --seconds 100

One layer of 64 heads of 128 over 4 in bfloat16, defaults of NSA. Kernels are checked and timed as
in narrow_decode.py: against the float64 reference, and each as a replayed graph with a cold L2
cache. Writes short_decode.json after each size.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path

import torch
from narrow_decode import (
    BRANCHES,
    CHECKED,
    COMPRESSED,
    Bench,
    Kernel,
    Steps,
    compile_all,
    size_of,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsagen.bench.decode import ATTENTION
from nsagen.bench.decode_cases import AttentionCaches
from nsagen.bench.dense import dense
from nsagen.bench.measure import graphed, milliseconds
from nsagen.bench.results import check_free, write_results
from nsagen.cases.base import Sizes

FEW = 8192
"""Tokens of the longest contexts whose windows one program walks."""

# (block_n, num_warps, num_stages, programs) and registers, as in narrow_decode.
WHOLE: list[Steps] = [
    *(((64, 4, 4, 264), 0), ((64, 8, 4, 264), 0), ((128, 8, 2, 264), 0), ((128, 8, 3, 264), 0)),
    *(((128, 4, 2, 264), 0), ((256, 8, 1, 264), 0), ((64, 2, 4, 264), 0), ((32, 4, 5, 264), 0)),
]
SPLIT_SHORT: list[Steps] = [((128, 8, 2, 264), 0), ((256, 8, 1, 264), 0), ((32, 4, 4, 528), 0)]
SPLIT_LONG: list[Steps] = [
    *(((64, 4, 3, 264), 0), ((64, 4, 5, 264), 0), ((64, 4, 4, 396), 0), ((128, 8, 3, 264), 0)),
    *(((64, 8, 4, 264), 0), ((128, 4, 3, 264), 0), ((64, 4, 3, 528), 0)),
]
BRANCHES_SHORT: list[Steps] = [
    *(((128, 8, 2, 264), 0), ((128, 4, 2, 264), 0), ((64, 8, 3, 264), 0), ((256, 8, 1, 132), 0)),
    *(((128, 8, 3, 132), 0), ((32, 4, 4, 528), 0), ((64, 2, 3, 528), 0)),
]
BRANCHES_LONG: list[Steps] = [
    *(((64, 4, 4, 264), 0), ((64, 4, 3, 528), 0), ((128, 8, 3, 264), 0), ((32, 4, 4, 528), 0)),
]
SIZES = ((1, 4096), (4, 4096), (8, 4096), (1, 8192), (32, 131072), (1, 32768), (8, 32768))


def kernels_of(context: int) -> list[Kernel]:
    """The defaults first, then what is compared with them."""
    compressed = functools.partial(Kernel, COMPRESSED, "", "split_kv")
    branches = functools.partial(Kernel, BRANCHES, "", "split_kv")
    found = [compressed()]
    if context <= FEW:
        whole = functools.partial(Kernel, COMPRESSED, "", "whole_rows", knobs={"whole_tiles": 16})
        found += [whole(steps) for steps, _ in WHOLE]
    found += [compressed(s) for s, _ in (SPLIT_SHORT if context <= FEW else SPLIT_LONG)]
    found += [compressed(knobs={"combine_warps": n}) for n in (1, 2, 8)]
    found.append(branches())
    found += [branches(s) for s, _ in (BRANCHES_SHORT if context <= FEW else BRANCHES_LONG)]
    return found + [branches(knobs={"combine_warps": n}) for n in (1, 2, 8)]


class ShortBench(Bench):
    """The same, with the op that appends and dense attention beside each size."""

    def beside(self, batch: int, context: int) -> None:
        """Time what has no candidates."""
        if time.monotonic() > self.end:
            return
        c = AttentionCaches(ATTENTION, batch, context, torch.device("cuda"), torch.bfloat16)
        append = Kernel("cache_append", "", "shipped")
        self.row(batch, context, append, ms=milliseconds(graphed(c.ops()["cache_append"])))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            ms = milliseconds(graphed(functools.partial(dense, c.q, c.cache.k, c.cache.v)))
        self.row(batch, context, Kernel("dense", "", "cuDNN"), ms=ms)
        self.row(batch, context, Kernel("all", "", "shipped"), ms=milliseconds(graphed(c.sparse)))

    def parts(self, kernel: Kernel, call: object) -> None:
        """Of few rows, launches are what is measured."""

    def table(self) -> None:
        """The three fastest of each size and op, after the default."""
        ops: dict[tuple[object, ...], list[dict[str, object]]] = {}
        for row in self.rows:
            if "ms" in row:
                ops.setdefault((row["batch"], row["context"], row["op"]), []).append(row)
        for (batch, context, op), rows in ops.items():
            best = sorted(rows[1:], key=lambda row: float(str(row["ms"])))[:3]
            text = "; ".join(
                f"{row['kernel']} {float(str(row['ms'])):.4f}{' WRONG' * ('wrong' in row)}"
                for row in [rows[0], *best]
            )
            print(f"{batch} x {context} {op}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder; default: benchmarks/results")
    parser.add_argument("--seconds", type=float, default=100, help="begin no size after these")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument("--sizes", nargs="+", type=size_of, default=SIZES, help="1x4096 and such")
    options = parser.parse_args()
    check_free("short_decode", options.out)
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = [
            (kernel, folder, sizes)
            for batch, context in options.sizes
            for kernel in kernels_of(context)
            for sizes in (Sizes((context - 1,) * batch, kv_heads=4, capacity=context), CHECKED)
        ]
        compile_all(work)
        print(f"compiled with {end - time.monotonic():.0f} s left", flush=True)
        if options.compile_only:
            return
        bench = ShortBench(folder, options.out, end)
        for batch, context in options.sizes:
            bench.size(batch, context, "", kernels_of(context))
            bench.beside(batch, context)
            write_results("short_decode", bench.rows, options.out)
        bench.table()


if __name__ == "__main__":
    main()
