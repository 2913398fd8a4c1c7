"""Selected and sliding branch of pieces of a sequence, on one GPU: forced blocks once, and twice.

    python benchmarks/pieces.py --out pieces.json

Two ranks' pieces of one sequence, one rank after the other, and the chunk that ends a prompt,
beside the whole sequence: outputs must agree, and two ranks together should take the time of the
whole. Heads of the attention layer (64 over 4 of 128) and of the example's step (16 over 2 of 64),
with learned and with random selections. Kernels are compiled first, in processes of their own.
Meant for a minute on an H200, half of it with kernels in Triton's cache; each case is written at
once. Exits 1 if a result is wrong or does not repeat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import triton.testing
from torch import Tensor

from nsagen.bench.measure import require_gpu
from nsagen.bench.results import provenance
from nsagen.bench.selections import SELECTIONS, learned_selection
from nsagen.bench.shape import Shape
from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.core.files import replace_file
from nsagen.distributed.cuts import Cut, offsets
from nsagen.ops import reference
from nsagen.ops.forced_blocks import (
    free_blocks_attention,
    free_blocks_gated_sum,
    window_and_forced_blocks,
)
from nsagen.ops.selected_attention import selected_attention_forward
from nsagen.ops.sliding_window_attention import sliding_window_attention_forward
from nsagen.ops.sliding_window_gated_sum import sliding_window_gated_sum

RANKS = 2
TOKENS = (131072, 16384)
CHUNK = 8192
WAYS = ("once", "twice")
SHAPES = {
    "layer": Shape(),
    "step": Shape(kv_heads=2, gqa_ratio=8, head_dim=64, v_head_dim=64),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Some queries of a sequence, beside the keys up to their end.

    Attributes:
        rows: of the whole sequence's queries; keys: of its keys, as the part reads them.
        chunk: cu_seqlens_k and q_start; None, both, for the whole sequence.
    """

    rows: Tensor
    keys: Tensor
    ends: Tensor
    chunk: tuple[Tensor | None, Tensor | None] = (None, None)


def parts_of(tokens: int, device: str) -> dict[str, Part]:
    """The whole sequence, each rank's two pieces, and the chunk at the end."""

    def part(firsts: list[int], ends: list[int]) -> Part:
        pairs = [*zip(firsts, ends, strict=True)]
        rows = torch.cat([torch.arange(lo, hi) for lo, hi in pairs])
        keys = torch.cat([torch.arange(hi) for hi in ends])
        lengths = (torch.tensor([hi - lo for lo, hi in pairs]), torch.tensor(ends))
        mine, seen = (offsets(x).to(device, torch.int32) for x in lengths)
        start = torch.tensor(firsts, dtype=torch.int32, device=device)
        return Part(rows.to(device), keys.to(device), mine, (seen, start))

    cut, every = Cut.of_tokens([tokens], RANKS), torch.arange(tokens, device=device)
    found = {"whole": Part(every, every, torch.tensor([0, tokens], dtype=torch.int32).to(device))}
    for rank in range(RANKS):
        ends = cut.ends(rank).flatten().tolist()
        found[f"rank {rank}"] = part(cut.firsts(rank).flatten().tolist(), ends)
    if tokens > CHUNK:
        found["chunk"] = part([tokens - CHUNK], [tokens])
    return found


def blocks_of(shape: Shape, tokens: int, selection: str, device: str) -> Tensor:
    """topk_idx as block selection writes it. Random free blocks are one of each of equal parts of
    all that a token has."""
    if selection == "learned":
        return learned_selection(shape.kv_heads, tokens, device)
    size, init, local = shape.block_size, shape.init_blocks, shape.local_blocks
    token = torch.arange(tokens, device=device)
    forced = reference.forced_blocks(token, block_size=size, init_blocks=init, local_blocks=local)
    many = shape.topk - init - local
    free = (token // size - local - init + 1).clamp(min=0)[:, None]  # blocks between them
    random = torch.Generator(device).manual_seed(0)
    draw = torch.rand(shape.kv_heads, tokens, many, generator=random, device=device)
    steps = torch.arange(many, device=device) + draw
    block = (init + (free * steps / many).long()).where(free >= many, -1)
    found = torch.cat([forced.expand(shape.kv_heads, -1, -1), block], -1)
    found = found.masked_fill(found < 0, 1 << 30).sort(-1).values
    return found.masked_fill(found == 1 << 30, -1).to(torch.int32)


class Calls:
    """The calls of a shape, a length and a selection."""

    def __init__(self, shape: Shape, tokens: int, selection: str, device: str = "cuda") -> None:
        random = torch.Generator(device).manual_seed(0)

        def normal(heads: int, dim: int) -> Tensor:
            x = torch.randn(tokens, heads, dim, device=device, generator=random)
            return x.to(getattr(torch, shape.dtype))

        self.shape, self.parts = shape, parts_of(tokens, device)
        self.q = normal(shape.query_heads, shape.head_dim)
        self.k = normal(shape.kv_heads, shape.head_dim)
        self.v = normal(shape.kv_heads, shape.v_head_dim)
        self.other = normal(shape.query_heads, shape.v_head_dim)
        self.gate = normal(shape.query_heads, 3).sigmoid()
        self.blocks = blocks_of(shape, tokens, selection, device)

    def call(self, name: str, way: str) -> Callable[[], tuple[Tensor, ...]]:
        """What gives (o, lse) of the selected branch and of the window; of the chunk, the gated
        sum with another branch, as inference computes it."""
        part, s = self.parts[name], self.shape
        q, k, v = self.q[part.rows], self.k[part.keys], self.v[part.keys]
        blocks = self.blocks[:, part.rows].contiguous()
        other, gate = self.other[part.rows], self.gate[part.rows]
        forced = (s.block_size, s.init_blocks, s.local_blocks)
        more = (s.head_dim**-0.5, "", *part.chunk)
        tensors, size = (q, k, v, blocks, part.ends), (s.block_size, *more)
        window = (q, k, v, part.ends)

        def once() -> tuple[Tensor, ...]:
            o, lse, o_forced, lse_forced = window_and_forced_blocks(
                *window, s.window_size, *forced, *more
            )
            first = (o_forced, lse_forced)
            if name == "chunk":
                return (free_blocks_gated_sum(*tensors, *first, other, o, gate, *forced, *more),)
            return *free_blocks_attention(*tensors, *first, *forced, *more), o, lse

        def twice() -> tuple[Tensor, ...]:
            selected = selected_attention_forward(*tensors, *size)
            if name == "chunk":
                both = (other, selected[0], gate)
                return (sliding_window_gated_sum(*window, *both, s.window_size, *more),)
            return *selected, *sliding_window_attention_forward(*window, s.window_size, *more)

        return {"once": once, "twice": twice}[way]


def compile_calls(job: tuple[str, str, str]) -> None:
    """Fill Triton's cache with the kernels of one call, in a process of its own."""
    shape, name, way = job
    Calls(SHAPES[shape], TOKENS[-1], "learned").call(name, way)()
    torch.cuda.synchronize()


def measure(
    shape: str, tokens: int, selection: str, device: str = "cuda", time_of: Any = None
) -> list[Row]:
    """A row for each part: milliseconds of each way, and the error of forced blocks once, relative
    to the threshold, against the whole sequence's rows; of the chunk against the other way."""
    calls, rows, whole = Calls(SHAPES[shape], tokens, selection, device), [], ()
    limit = THRESHOLDS[calls.q.dtype]
    for name, part in calls.parts.items():
        ways = {way: calls.call(name, way) for way in WAYS}
        found, other = ways["once"](), ways["twice"]()
        whole = found if name == "whole" else whole
        right = other if name in ("whole", "chunk") else [x[part.rows] for x in whole]
        pairs = [*zip(found, right, strict=True)]
        errors = [relative_error(a.float(), b) / limit for a, b in pairs]
        again = zip(found, ways["once"](), strict=True)
        rows.append(
            {
                **{"shape": shape, "tokens": tokens, "selection": selection, "part": name},
                **{way: (time_of or milliseconds)(call) for way, call in ways.items()},
                "error": max(errors),
                "same_bits": all(torch.equal(*pair) for pair in pairs),
                "repeats": all(torch.equal(*pair) for pair in again),
            }
        )
    return rows


def milliseconds(call: Callable[[], object]) -> float:
    """As `nsagen.bench.measure` has it, in less time."""
    return cast(float, triton.testing.do_bench(call, warmup=5, rep=60, return_mode="median"))


def table(rows: list[Row]) -> str:
    """A line for each case: milliseconds once/twice of the whole, both ranks, and the chunk."""
    lines = []
    for key, some in itertools.groupby(rows, lambda r: (r["shape"], r["tokens"], r["selection"])):
        of = {row["part"]: row for row in some}
        ranks = [sum(of[f"rank {rank}"][way] for rank in range(RANKS)) for way in WAYS]
        chunk = [f"{of['chunk'][way]:.3f}" for way in WAYS if "chunk" in of]
        worst = max(row["error"] for row in of.values())
        lines.append(
            f"{' '.join(map(str, key))}: {of['whole']['once']:.3f}/{of['whole']['twice']:.3f}; "
            f"ranks {ranks[0]:.3f}/{ranks[1]:.3f}, {ranks[0] / of['whole']['once']:.3f} of it; "
            f"chunk {'/'.join(chunk)}; error {worst:.2f} of the threshold, "
            f"repeats {all(row['repeats'] for row in of.values())}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=[*SHAPES])
    parser.add_argument("--compiled", action="store_true", help="kernels are in Triton's cache")
    given = parser.parse_args()
    require_gpu("pieces")
    began, rows = time.perf_counter(), list[Row]()
    jobs = [*itertools.product(given.shapes, ("whole", "rank 0", "chunk"), WAYS)]
    if not given.compiled:
        with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_calls, jobs))
    about = provenance() | {"ready_s": round(time.perf_counter() - began, 1)}
    print("ready after", about["ready_s"], "s", flush=True)
    for case in itertools.product(given.shapes, TOKENS, SELECTIONS):
        found = measure(*case)
        rows += found
        replace_file(given.out, json.dumps({"provenance": about, "rows": rows}, indent=1) + "\n")
        print(table(found), flush=True)
    return int(any(row["error"] > 1 or not row["repeats"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
