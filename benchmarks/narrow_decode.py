"""Attention of a decode step, float8 caches beside bfloat16: forms and schedules.

    python benchmarks/narrow_decode.py --out "$OUT"

One layer of 64 heads of 128 over 4, defaults of NSA. Each kernel is first compared with the float64
reference, on three short sequences, and on the timed caches with the first kernel. Each call is a
replayed graph with a cold L2 cache. Writes narrow_decode.json after each size.

float8 is read in pairs of numbers; "bytes" is the form that int8 has, which reads them one by one.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nsagen.bench.decode import ATTENTION
from nsagen.bench.decode_cases import AttentionCaches
from nsagen.bench.measure import graphed, milliseconds
from nsagen.bench.results import check_free, write_results
from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.codegen.spaces import split_kv
from nsagen.codegen.template import kernel_name, render, rendered, space_for
from nsagen.core.importing import import_file
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Param, Schedule, Workload

TARGET = KNOWN_TARGETS["cuda:90"]
BATCHES, CONTEXTS = (1, 4, 32), (4096, 32768, 131072)
LARGEST = (32, 131072)
FLOAT8 = "float8_e4m3fn"
DTYPES = ("", FLOAT8)
COMPRESSED, BRANCHES = "compressed_attention", "native_sparse_attention"
SELECTED = "selected_attention"  # of other members: not a part of the whole
BLOCKS = {"block_size": 64, "topk": 16}
STATICS: dict[str, dict[str, int]] = {
    COMPRESSED: {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "local_blocks": 2},
    BRANCHES: {"window_size": 512},
    SELECTED: {},
}
CHECKED = Sizes((63, 4095, 2900), kv_heads=4, capacity=4096)
HEADS = {"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16}

# (block_n, num_warps, num_stages, programs) and registers, beside the defaults: at all sizes, or at
# the largest.
Steps = tuple[tuple[int, int, int, int], int]
EVERYWHERE: dict[str, list[Steps]] = {
    "": [],
    FLOAT8: [((32, 1, 3, 1056), 0), ((32, 1, 3, 528), 0), ((64, 2, 3, 264), 0)],
}
STEPS: dict[str, list[Steps]] = {
    "": [],
    FLOAT8: [
        *(((64, 2, 4, 528), 0), ((64, 2, 2, 528), 0), ((64, 4, 3, 264), 0), ((64, 4, 4, 264), 0)),
        *(((128, 4, 3, 264), 0), ((16, 1, 3, 1584), 168)),
    ],
}
BRANCHES_EVERYWHERE: dict[str, list[Steps]] = {
    "": [],
    FLOAT8: [((32, 1, 3, 896), 0), ((32, 1, 3, 528), 0)],
}
BRANCH_STEPS: dict[str, list[Steps]] = {
    "": [],
    FLOAT8: [
        *(((64, 2, 4, 264), 0), ((64, 2, 2, 264), 0), ((64, 2, 3, 528), 0), ((32, 1, 4, 528), 0)),
        *(((32, 1, 3, 264), 0), ((32, 1, 3, 1056), 0), ((64, 4, 3, 264), 0)),
    ],
}


NONE: dict[str, list[Steps]] = {"": [], FLOAT8: []}


@dataclass(frozen=True)
class Kernel:
    """A variant of an op's decode pass; `programs` need not be one that tuning may choose."""

    op: str
    cache_dtype: str
    algorithm: str = ""
    steps: tuple[int, int, int, int] | None = None
    knobs: dict[str, Param] = field(default_factory=dict, hash=False)
    registers: int = 0  # of a thread of the first kernel, at most; 0: any
    in_pairs: bool = True  # or in bytes, for float8

    @property
    def name(self) -> str:
        steps = "default" if self.steps is None else "n{} w{} s{} p{}".format(*self.steps)
        more = "".join(f" {name} {value}" for name, value in self.knobs.items())
        form = "" if self.in_pairs else " in bytes"
        return f"{self.algorithm}{form} {steps}{more}" + f" r{self.registers}" * bool(
            self.registers
        )

    @property
    def workload(self) -> Workload:
        narrow: dict[str, Param] = {"cache_dtype": self.cache_dtype} if self.cache_dtype else {}
        sizes = {**HEADS, **BLOCKS, **STATICS[self.op]}
        return Workload.of(self.op, "decode", dtype="bfloat16", **narrow, **sizes)

    def launch(self, folder: Path) -> Callable[..., None]:
        return import_file(self.file(folder)).launch

    def reads_pairs(self, workload: Workload) -> bool:
        return self.in_pairs and bool(workload.cache_dtype)

    def file(self, folder: Path) -> Path:
        work = self.workload
        default = space_for(work, self.algorithm).default_schedule(work, TARGET)
        knobs = dict(default.knobs) | self.knobs
        programs = knobs["programs"]
        if self.steps is not None:
            names = ("block_n", "num_warps", "num_stages")
            knobs |= dict(zip(names, self.steps, strict=False))
            programs = self.steps[3]
        schedule = Schedule.of(self.algorithm, knobs)
        form = "pairs" if self.in_pairs else "bytes"
        path = folder / f"{kernel_name(work, schedule)}_{form}_{programs}_{self.registers}.py"
        if not path.exists():
            with mock.patch.object(split_kv, "in_pairs", self.reads_pairs):
                rendered.cache_clear()  # it knows nothing of the patch
                text = render(work, schedule, header=f"# {work}: {schedule}")
            rendered.cache_clear()
            old = f"PROGRAMS = {knobs['programs']}\n"
            text = text.replace(old, f"PROGRAMS = {programs}\n")
            if self.registers:
                stages = f"        num_stages={knobs['num_stages']},\n"
                text = text.replace(stages, stages + f"        maxnreg={self.registers},\n")
            path.write_text(text)
        return path


def compile_one(kernel: Kernel, folder: Path, sizes: Sizes) -> None:
    """Into Triton's cache, where the launch finds it."""
    from nsagen.aot.compile import compile_launch, recorded_launches

    for call in recorded_launches(kernel.file(folder), kernel.workload, sizes):
        compile_launch(call, TARGET, kernel.name)


def wrong(kernel: Kernel, folder: Path) -> str:
    """Where a kernel differs from the float64 reference on three short sequences, or ""."""
    case = cases_of(kernel.workload).make_case(kernel.workload, CHECKED, "cuda")
    kernel.launch(folder)(*case.args)
    found = []
    for name, expected in case.expected().items():
        out = case.outputs[name]
        if not out.dtype.is_floating_point:
            found += [name] * (not torch.equal(out.cpu(), expected.cpu()))
        elif (error := relative_error(out, expected)) > THRESHOLDS[out.dtype]:
            found.append(f"{name} {error:.2g}")
    return ", ".join(found)


class Bench:
    """Kernels on the caches of one size after another."""

    def __init__(self, folder: Path, out: Path | None, end: float) -> None:
        self.folder, self.out, self.end = folder, out, end
        self.rows: list[dict[str, Any]] = []
        self.checked: dict[Kernel, str] = {}

    def size(self, batch: int, context: int, cache_dtype: str, kernels: Sequence[Kernel]) -> None:
        """Time kernels on caches of one size, and the whole attention by the first of each op."""
        if time.monotonic() > self.end:
            print(f"out of time before {batch} x {context} {cache_dtype}", flush=True)
            return
        c = AttentionCaches(
            *(ATTENTION, batch, context, torch.device("cuda"), torch.bfloat16),
            cache_dtype=cache_dtype or None,
        )
        expected: dict[str, tuple[Tensor, ...]] = {}
        calls: dict[str, dict[str, Callable[[], object]]] = {op: {} for op in STATICS}
        took: dict[str, dict[str, float]] = {op: {} for op in STATICS}
        for kernel in kernels:
            outputs, call = self.call(kernel, c, expected)
            try:
                if kernel not in self.checked:
                    self.checked[kernel] = wrong(kernel, self.folder)
                call()
            except Exception as error:  # a schedule that does not fit is a row, too
                self.row(batch, context, kernel, failed=repr(error)[:200])
                continue
            agrees = self.compare(expected.setdefault(kernel.op, outputs), outputs)
            ms = milliseconds(graphed(call))
            if self.checked[kernel]:
                agrees["wrong"] = self.checked[kernel]
            self.row(batch, context, kernel, ms=ms, **agrees)
            calls[kernel.op][kernel.name], took[kernel.op][kernel.name] = call, ms
            if len(calls[kernel.op]) <= 3 and batch * context >= 32 * 131072:
                self.parts(kernel, call)
        # The defaults, their other form, and the fastest of each.
        times_of = (took[COMPRESSED], took[BRANCHES])
        tried = [[*list(t)[:2], *sorted(t, key=t.__getitem__)[:1]] for t in times_of]
        pairs = zip(*tried, strict=False)  # a kernel may have failed
        for compressed, branches in dict.fromkeys(pairs):
            steps = (
                c.ops()["cache_append"],
                calls[COMPRESSED][compressed],
                calls[BRANCHES][branches],
            )
            ms = milliseconds(graphed(lambda steps=steps: [step() for step in steps]))
            whole = Kernel(f"all, {branches}", cache_dtype, compressed)
            self.row(batch, context, whole, ms=ms)
        write_results("narrow_decode", self.rows, self.out)

    def call(
        self, kernel: Kernel, c: AttentionCaches, expected: dict[str, tuple[Tensor, ...]]
    ) -> tuple[tuple[Tensor, ...], Callable[[], object]]:
        launch, scale = kernel.launch(self.folder), 128**-0.5
        o = torch.full_like(c.q, float("nan"))
        if kernel.op == COMPRESSED:
            idx = torch.full((4, len(c.q), 16), -7, dtype=torch.int32, device=c.q.device)
            at = (c.cache.ck, c.cache.cv, c.positions, c.slots)
            more = (c.cache.ck_scale, c.cache.cv_scale) if kernel.cache_dtype else ()
            return (o, idx), partial(launch, c.q, *at, o, idx, scale, None, *more)
        of_compressed, idx = expected[COMPRESSED]
        if kernel.op == SELECTED:
            more = (None, c.cache.k_scale, c.cache.v_scale) if kernel.cache_dtype else ()
            at = (c.cache.k, c.cache.v, idx, c.positions, c.slots)
            return (o,), partial(launch, c.q, *at, o, scale, *more)
        at = (c.cache.k, c.cache.v, idx, c.positions, c.slots, of_compressed, c.gate)
        more = (None, None, c.cache.k_scale, c.cache.v_scale) if kernel.cache_dtype else ()
        return (o,), partial(launch, c.q, *at, o, scale, None, *more)

    def compare(self, expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> dict[str, Any]:
        rows: dict[str, Any] = {"error": relative_error(found[0], expected[0])}
        if len(found) > 1:
            rows["other_blocks"] = (found[1] != expected[1]).float().mean().item()
        return rows

    def parts(self, kernel: Kernel, call: Callable[[], object]) -> None:
        """The times of a call's kernels, by the profiler."""
        flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(20):
                flush.zero_()
                call()
            torch.cuda.synchronize()
        for event in found.key_averages():
            if any(name in event.key for name in ("decode__", "combine", "sum_branches")):
                us = event.device_time_total / event.count
                row = {"part": event.key[:60], "kernel": kernel.name, "us": us}
                self.rows.append(row | {"cache": kernel.cache_dtype or "bfloat16"})
                print(f"    {self.rows[-1]}", flush=True)

    def row(self, batch: int, context: int, kernel: Kernel, **found: Any) -> None:
        row = {"batch": batch, "context": context, "op": kernel.op, "kernel": kernel.name}
        row["cache"] = kernel.cache_dtype or "bfloat16"
        self.rows.append(row | found)
        text = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()
        )
        print(f"{batch} x {context} {row['cache']} {kernel.op}: {kernel.name}: {text}", flush=True)


def kernels_of(cache_dtype: str, every: bool) -> list[Kernel]:
    """What is timed: the defaults, in bytes too, and other schedules; with `every` more of them."""
    found = []
    for op, everywhere, more in (
        (COMPRESSED, EVERYWHERE, STEPS),
        (BRANCHES, BRANCHES_EVERYWHERE, BRANCH_STEPS),
        (SELECTED, NONE, NONE),
    ):
        form = partial(Kernel, op, cache_dtype, "split_kv")
        found.append(form())
        if cache_dtype:
            found.append(form(in_pairs=False))
        steps = everywhere[cache_dtype] + (more[cache_dtype] if every else [])
        found += [form(s, registers=r) for s, r in steps]
    return found


def size_of(text: str) -> tuple[int, int]:
    batch, context = map(int, text.split("x"))
    return batch, context


def compile_all(work: Sequence[tuple[Kernel, Path, Sizes]]) -> None:
    """Compile kernels for their sizes, side by side; those that fail are named."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, multiprocessing.cpu_count()), spawn) as pool:
        for job in [pool.submit(compile_one, *one) for one in work]:
            if error := job.exception():
                print(f"not compiled: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder; default: benchmarks/results")
    parser.add_argument("--seconds", type=float, default=85, help="begin nothing after these")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    every = [LARGEST, *(s for c in CONTEXTS for b in BATCHES if (s := (b, c)) != LARGEST)]
    parser.add_argument("--sizes", nargs="+", type=size_of, default=every, help="1x4096 and such")
    options = parser.parse_args()
    check_free("narrow_decode", options.out)
    end = time.monotonic() + options.seconds
    sizes = options.sizes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = kernels_of("", True) + kernels_of(FLOAT8, True)
        work = [(kernel, folder, CHECKED) for kernel in every]
        work += [
            (kernel, folder, Sizes((context - 1,) * batch, kv_heads=4, capacity=context))
            for batch, context in sizes
            for narrow in DTYPES
            for kernel in kernels_of(narrow, (batch, context) == LARGEST)
        ]
        compile_all(work)
        print(f"compiled with {end - time.monotonic():.0f} s left", flush=True)
        if options.compile_only:
            return
        bench = Bench(folder, options.out, end)
        for (batch, context), narrow in itertools.product(sizes, DTYPES):
            kernels = kernels_of(narrow, (batch, context) == LARGEST)
            bench.size(batch, context, narrow, kernels)


if __name__ == "__main__":
    main()
