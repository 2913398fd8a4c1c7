"""65536 tokens as one sequence and as thousands: each kernel's time, of all algorithms.

    python benchmarks/many_sequences.py --out many_sequences.json

64 query heads over 4, head_dim 128, windows of 32 by 16, blocks of 64, topk 16, window 512,
bfloat16; the default algorithm's default schedule, and from 16 sequences on those of others. A
launch's kernels are timed by the profiler, medians of several launches. Kernels are compiled first,
in processes of their own. Meant for 40 seconds on an H200.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forced_and_union import SM90, Launch, Variant, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsagen.aot.compile import compile_variant
from nsagen.bench.measure import Ceilings, measure_ceilings
from nsagen.bench.results import provenance
from nsagen.bench.shape import Inputs, Shape
from nsagen.cases.base import Sizes, cases_of, cu_seqlens_of
from nsagen.codegen.template import kernel_name, spaces_for
from nsagen.core.importing import import_file
from nsagen.core.workload import Workload

TOKENS, BATCHES, LAUNCHES = 65536, (1, 16, 256, 1024, 4096), 5
SHAPE = Shape()
LEFT_OUT = {"key_blocks", "key_major"}
"""Algorithms that lost to the others at every length."""

OPS = (
    ("compress", "forward"),
    ("compressed_attention", "forward"),
    ("block_selection", "forward"),
    ("selected_attention", "forward"),
    ("sliding_window_attention", "forward"),
    ("compress", "backward"),
    ("compressed_attention", "backward"),
    ("selected_attention", "backward"),
    ("sliding_window_attention", "backward"),
)


def sizes_of(batch: int) -> Sizes:
    return Sizes((TOKENS // batch,) * batch, SHAPE.kv_heads)


def variants(op: str, pass_: str) -> dict[str, Variant]:
    """Each algorithm that covers the shape, the default first."""
    w = SHAPE.workload(op, pass_)
    return {
        space.algorithm: (w, space.default_schedule(w, SM90))
        for space in spaces_for(w, SM90)
        if space.algorithm not in LEFT_OUT
    }


@dataclass(frozen=True)
class Job:
    """A file to compile as a batch's sizes specialize it."""

    path: Path
    workload: Workload
    batch: int

    def run(self) -> None:
        compile_variant(self.path, self.workload, SM90, sizes_of(self.batch))


def kernel_times(call: Callable[[], None]) -> dict[str, float]:
    """Median milliseconds of each kernel that a call launches, by name."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(LAUNCHES):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if "CUDA" in str(event.device_type):
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    return {name: statistics.median(found) * len(found) / LAUNCHES for name, found in times.items()}


class Calls:
    """Arguments of every launch of a batch; outputs of earlier ones are inputs of later ones."""

    def __init__(self, batch: int, device: str = "cuda") -> None:
        x, s = Inputs.random(SHAPE, TOKENS, device=device), SHAPE
        length = TOKENS // batch
        windows = max(0, (length - s.kernel_size) // s.kernel_stride + 1)
        ends, window_ends = (cu_seqlens_of((n,) * batch, device) for n in (length, windows))
        o, scale = torch.empty_like(x.q), float(s.head_dim**-0.5)
        do = torch.randn_like(o)
        rows = x.q.shape[:2]
        lse = {op: torch.empty(rows, device=device) for op in ("compressed", "selected", "sliding")}
        blocks = torch.empty(s.kv_heads, TOKENS, s.topk, dtype=torch.int32, device=device)

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(map(torch.empty_like, tensors))

        of_windows = (x.q, x.ck, x.cv, ends, window_ends)
        of_tokens = (x.q, x.k, x.v)
        dq_dk_dv, dq_dck_dcv = gradients(*of_tokens), gradients(x.q, x.ck, x.cv)
        self.args: dict[tuple[str, str], tuple[Any, ...]] = {
            ("compress", "forward"): (x.k, None, None, ends, window_ends, x.ck),
            ("compress", "backward"): (
                *(torch.randn_like(x.ck), x.k, None, None, ends, window_ends),
                *(torch.empty_like(x.k), None, None),
            ),
            ("compressed_attention", "forward"): (*of_windows, o, lse["compressed"], scale),
            ("compressed_attention", "backward"): (
                *(do, *of_windows, o, lse["compressed"], *dq_dck_dcv, scale),
            ),
            ("block_selection", "forward"): (
                *(x.q, x.ck, lse["compressed"], ends, window_ends, blocks, scale),
            ),
            ("selected_attention", "forward"): (
                *(*of_tokens, blocks, ends, o, lse["selected"], scale),
            ),
            ("selected_attention", "backward"): (
                *(do, *of_tokens, blocks, ends, o, lse["selected"], *dq_dk_dv, scale),
            ),
            ("sliding_window_attention", "forward"): (*of_tokens, ends, o, lse["sliding"], scale),
            ("sliding_window_attention", "backward"): (
                *(do, *of_tokens, ends, o, lse["sliding"], *dq_dk_dv, scale),
            ),
        }


def rows_of(
    batch: int, launches: Mapping[tuple[str, str], Mapping[str, Launch]], ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    calls, alone = Calls(batch), Sizes((TOKENS // batch,), SHAPE.kv_heads)
    for (op, pass_), found in launches.items():
        w, args = SHAPE.workload(op, pass_), calls.args[op, pass_]
        floor_ms = batch * ceilings.floor_ms(cases_of(w).make_case(w, alone, "meta").cost)
        for place, (algorithm, launch) in enumerate(found.items()):
            if place and batch == 1:
                continue
            kernels = kernel_times(lambda launch=launch, args=args: launch(*args))
            yield {
                "op": op,
                "pass": pass_,
                "sequences": batch,
                "algorithm": algorithm,
                "default": place == 0,
                "ms": sum(kernels.values()),
                "floor_ms": floor_ms,
                "kernels": kernels,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("many_sequences.json"))
    out, rows = parser.parse_args().out, []
    every = {of: variants(*of) for of in OPS}
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's file when it compiles
        paths = {
            of: {name: write(Path(folder), name, v) for name, v in found.items()}
            for of, found in every.items()
        }
        jobs = [
            Job(path, SHAPE.workload(*of), batch)
            for of, found in paths.items()
            for place, path in enumerate(found.values())
            for batch in BATCHES[place > 0 : 2]  # the others' sizes divide by 16, too
        ]
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(Job.run, jobs))
        launches = {
            of: {name: import_file(path).launch for name, path in found.items()}
            for of, found in paths.items()
        }
        ceilings = measure_ceilings()
        for batch in BATCHES:
            rows += rows_of(batch, launches, ceilings)
            out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")
            torch.cuda.empty_cache()
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Milliseconds by batch, then the default's kernels."""
    names = dict.fromkeys((row["op"], row["pass"], row["algorithm"]) for row in rows)
    cells = {(row["op"], row["pass"], row["algorithm"], row["sequences"]): row for row in rows}
    print(f"{'':62}" + "".join(f"{batch:>9}" for batch in BATCHES))
    for name in names:
        found = [cells[*name, batch] for batch in BATCHES if (*name, batch) in cells]
        blank = " " * (62 + 9 * (len(BATCHES) - len(found)))
        print(f"{' '.join(name):{len(blank)}}" + "".join(f"{row['ms']:9.3f}" for row in found))
        if found[0]["default"]:
            for label in ("floor_ms", *dict.fromkeys(k for row in found for k in row["kernels"])):
                values = [row.get(label, row["kernels"].get(label, 0.0)) for row in found]
                own = label.replace(kernel_name(*variants(*name[:2])[name[2]]), "...")
                print(f"    {own:58.58}" + "".join(f"{ms:9.3f}" for ms in values))
    for pass_ in ("forward", "backward"):
        own = [row for row in rows if row["default"] and row["pass"] == pass_]
        total = [sum(row["ms"] for row in own if row["sequences"] == batch) for batch in BATCHES]
        print(f"{f'all of it, {pass_}':62}" + "".join(f"{ms:9.3f}" for ms in total))


if __name__ == "__main__":
    main()
