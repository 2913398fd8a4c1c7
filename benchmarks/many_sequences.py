"""65536 tokens as one sequence and as thousands: each kernel's time, of all algorithms.

    python benchmarks/many_sequences.py --out many_sequences.json

64 query heads over 4, head_dim 128, windows of 32 by 16, blocks of 64, topk 16, window 512,
bfloat16; the default algorithms' default schedules, then also the others', and one sequence last.
Kernels are compiled in processes of their own, each as soon as one is free. A launch's kernels are
timed by the profiler: medians of several launches. The file grows with each batch, so that a run
that is cut off leaves what it had. Meant for 30 seconds on an H200.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from forced_and_union import SM90, Variant, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.bench.results import provenance
from nsagen.bench.shape import Inputs, Shape
from nsagen.cases.base import Sizes, cases_of, cu_seqlens_of
from nsagen.codegen.template import kernel_name, spaces_for
from nsagen.core.importing import import_file
from nsagen.core.workload import Workload

TOKENS, BATCHES, LAUNCHES = 65536, (4096, 1024, 256, 16, 1), 5
SHAPE = Shape()
LEFT_OUT = {"shared_blocks", "key_blocks", "key_major"}
"""Algorithms that share blocks among neighbours, or lost to the others at every length."""

FLOPS, BYTES = 7.9e14, 4.27e12
"""A second on an H200: of a bfloat16 matrix product of 8192, and of a large copy."""

Of = tuple[str, str, str]
"""An op, its pass and an algorithm."""

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


def variants(op: str, pass_: str) -> dict[str, Variant]:
    """Each algorithm that covers the shape, the default first."""
    w = SHAPE.workload(op, pass_)
    return {
        space.algorithm: (w, space.default_schedule(w, SM90))
        for space in spaces_for(w, SM90)
        if space.algorithm not in LEFT_OUT
    }


def compile_one(path: Path, workload: Workload, batch: int, index: int) -> None:
    """Fill Triton's cache with one kernel of a variant, as a batch's sizes specialize it."""
    calls = recorded_launches(path, workload, sizes_of(batch))
    compile_launch(calls[index], SM90, path.stem)


def sizes_of(batch: int) -> Sizes:
    return Sizes((TOKENS // batch,) * batch, SHAPE.kv_heads)


class Compiled:
    """Kernels of all variants, on their way."""

    def __init__(self, folder: Path, pool: ProcessPoolExecutor) -> None:
        found = {(*of, name): v for of in OPS for name, v in variants(*of).items()}
        firsts = {(*of, next(iter(variants(*of)))) for of in OPS}
        self.paths = {of: write(folder, of[2], v) for of, v in found.items()}
        self.default = [of for of in found if of in firsts]
        self.others = [of for of in found if of not in firsts]
        self.jobs: dict[tuple[Of, int], list[Future[None]]] = {}
        # Sizes of the other batches divide by 16, too; one sequence is specialized.
        for batch, wanted in ((16, self.default), (16, self.others), (1, self.default)):
            for of in wanted:
                w = found[of][0]
                calls = recorded_launches(self.paths[of], w, sizes_of(batch))
                given = [(self.paths[of], w, batch, index) for index in range(len(calls))]
                self.jobs[of, batch] = [pool.submit(compile_one, *job) for job in given]

    def launches(self, wanted: Sequence[Of], batch: int) -> dict[Of, Callable[..., None]]:
        for of in wanted:
            for job in self.jobs[of, min(batch, 16)]:
                job.result()
        return {of: import_file(self.paths[of]).launch for of in wanted}


def kernel_times(calls: Mapping[Of, Callable[[], None]]) -> dict[Of, dict[str, float]]:
    """Median milliseconds of each kernel that a call launches, by name."""

    def all_of_them() -> None:
        for call in calls.values():
            torch.cuda._sleep(1)  # its kernel marks where a call begins
            call()

    all_of_them()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(LAUNCHES):
            all_of_them()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() or () if "CUDA" in str(e.device_type)]
    times: dict[Of, dict[str, list[float]]] = {of: {} for of in calls}
    names, place = list(calls), -1
    for event in sorted(events, key=lambda e: e.time_range.start):
        if "spin_kernel" in event.name:
            place += 1
        elif place >= 0:
            found = times[names[place % len(names)]].setdefault(event.name, [])
            found.append(event.time_range.elapsed_us() / 1e3)
    return {
        of: {name: statistics.median(x) * len(x) / LAUNCHES for name, x in found.items()}
        for of, found in times.items()
    }


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


def rows_of(batch: int, launches: Mapping[Of, Callable[..., None]]) -> list[dict[str, Any]]:
    calls, alone = Calls(batch), Sizes((TOKENS // batch,), SHAPE.kv_heads)

    def bound(of: Of) -> Callable[[], None]:
        return lambda: launches[of](*calls.args[of[:2]])

    rows = []
    for (op, pass_, algorithm), kernels in kernel_times({of: bound(of) for of in launches}).items():
        w = SHAPE.workload(op, pass_)
        cost = cases_of(w).make_case(w, alone, "meta").cost
        seconds = batch * max(cost.flops / FLOPS, cost.bytes / BYTES)
        row = {"op": op, "pass": pass_, "algorithm": algorithm, "sequences": batch}
        ms = sum(kernels.values())
        rows.append(row | {"ms": ms, "floor_ms": 1e3 * seconds, "kernels": kernels})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("many_sequences.json"))
    out = parser.parse_args().out
    rows: list[dict[str, Any]] = []

    def measure(compiled: Compiled, wanted: Sequence[Of], batches: Sequence[int]) -> None:
        for batch in batches:
            found = rows_of(batch, compiled.launches(wanted, batch))
            print_rows(found)
            rows.extend(found)
            out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")
            torch.cuda.empty_cache()

    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,  # Triton reads a kernel's file when it compiles
        ProcessPoolExecutor(mp_context=context) as pool,
    ):
        compiled = Compiled(Path(folder), pool)
        measure(compiled, compiled.default, BATCHES[:-1])
        measure(compiled, [*compiled.default, *compiled.others], BATCHES[:-1])
        measure(compiled, compiled.default, BATCHES[-1:])


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Milliseconds of each call and of its kernels, and of all default calls of a pass."""
    print(f"{rows[0]['sequences']} sequences")
    for row in rows:
        of = (row["op"], row["pass"])
        name = kernel_name(*variants(*of)[row["algorithm"]])
        parts = [f"{k.removeprefix(name)} {ms:.3f}" for k, ms in row["kernels"].items()]
        label = f"{' '.join(of)} {row['algorithm']}"
        print(f"  {label:58} {row['ms']:8.3f} {row['floor_ms']:8.3f}  {', '.join(parts)}")
    for pass_ in ("forward", "backward"):
        first = {row["op"]: row["ms"] for row in reversed(rows) if row["pass"] == pass_}
        print(f"  {f'all of it, {pass_}':58} {sum(first.values()):8.3f}", flush=True)


if __name__ == "__main__":
    main()
