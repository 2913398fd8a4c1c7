"""Schedules of the family's kernels: gradients of the band and of long blocks, and M3's decoding.

    python benchmarks/family_schedules.py --out family_schedules.json    # on an H200: a minute
    python benchmarks/family_schedules.py --dry                          # what would be compared

Each schedule is compiled, and compared with the float64 reference, in a process of its own. Then
those of a call are timed one after another, the first being the default. Exits 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from family_attention import choose
from family_run import (
    FULL,
    INDEX,
    SM90,
    Layer,
    Run,
    attention_workload,
    graphed,
    milliseconds,
    normal,
    offsets,
)
from torch import Tensor

from nsagen.cases.base import cases_of
from nsagen.cases.sizes import sizes_for
from nsagen.codegen.template import default_schedule
from nsagen.core.workload import Workload

Knobs = dict[str, Any]
M3, CPM, MOBA = FULL.m3, FULL.minicpm, FULL.moba[-1]

STAGES: tuple[Knobs, ...] = ({}, *({"row_stages": n} for n in (2, 3, 4)))
PARTS: tuple[Knobs, ...] = ({}, {"part_tokens": 4096})
SPLITS: tuple[Knobs, ...] = (
    *({}, {"programs": 132}, {"programs": 528}, {"block_n": 32}, {"block_n": 128}),
    *({"num_warps": 2}, {"num_warps": 8}, {"combine_warps": 1}, {"combine_warps": 8}),
    {"block_n": 128, "num_warps": 8},
)
KEYS: tuple[Knobs, ...] = (
    *({}, {"programs": 132}, {"programs": 528}, {"programs": 1056}),
    *({"num_stages": 2}, {"num_stages": 3}, {"num_warps": 8}, {"block_n": 256}),
)


@dataclass(frozen=True)
class Call:
    """A call whose schedules are compared.

    Attributes:
        name: what it is, with its size.
        schedules: knobs that differ from the default's, which is the first.
        arguments: tokens, or a cache's -> the launch's arguments, on the GPU.
        tokens: of the call that is timed.
        outputs: places of what is written among these.
        topk: blocks of a list, in the comparison with the reference.
    """

    name: str
    workload: Workload
    schedules: tuple[Knobs, ...]
    arguments: partial[tuple[Any, ...]]
    tokens: int
    outputs: tuple[int, ...]
    topk: int = 16


def window_gradients(layer: Layer, tokens: int) -> tuple[Any, ...]:
    """Numbers of about the sizes that a forward pass gives: the time does not depend on them."""
    q, do, o = (normal(FULL, tokens, layer.heads, layer.dim) for _ in range(3))
    k, v = (normal(FULL, tokens, layer.kv_heads, layer.dim) for _ in range(2))
    lse = torch.full(q.shape[:2], 8.0, device="cuda")
    out = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    return (do, q, k, v, offsets(FULL, tokens), o, lse, *out, layer.dim**-0.5)


def selected_gradients(layer: Layer, tokens: int) -> tuple[Any, ...]:
    """The same with blocks as selection writes them."""
    *tensors, cu_seqlens, o, lse, dq, dk, dv, scale = window_gradients(layer, tokens)
    chosen = choose(FULL, layer, tokens)
    return (*tensors, chosen, cu_seqlens, o, lse, dq, dk, dv, scale)


def step(batch: int, context: int) -> tuple[Any, ...]:
    """M3's attention to the blocks of one new token a row."""
    q = normal(FULL, batch, M3.heads, M3.dim)
    k, v = (normal(FULL, batch, context, M3.kv_heads, M3.dim) for _ in range(2))
    chosen = torch.rand(M3.kv_heads, batch, context // M3.block, device="cuda").topk(M3.topk)
    at = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    chosen = chosen.indices.sort(-1).values.to(torch.int32)
    return (q, k, v, chosen, at, slots, torch.full_like(q, torch.nan), M3.dim**-0.5)


def scores(batch: int, context: int) -> tuple[Any, ...]:
    """M3's choice of blocks for one new token a row."""
    q = normal(FULL, batch, M3.kv_heads, M3.dim)
    k = normal(FULL, batch, context, 1, M3.dim)
    at = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    chosen = torch.empty(M3.kv_heads, batch, M3.topk, dtype=torch.int32, device="cuda")
    return (q, k, at, slots, chosen, M3.dim**-0.5, None)


def calls() -> Iterator[Call]:
    """What is compared, what matters most first."""
    narrow = replace(CPM, dim=64)
    band = {"window_size": CPM.local * CPM.block, "block_size": CPM.block}
    windows = (
        ("MiniCPM's band", CPM, band),
        ("a window of 512", CPM, {"window_size": 512}),
        ("a window of 512, heads of 64", narrow, {"window_size": 512}),
    )
    for name, layer, params in windows:
        work = attention_workload(layer, "sliding_window_attention", "backward", **params)
        made = partial(window_gradients, layer)
        for tokens in (32768, 131072):
            yield Call(f"{name}, backward, {tokens}", work, STAGES, made, tokens, (7, 8, 9))
    one = attention_workload(M3, "selected_attention", "decode", block_size=M3.block, topk=M3.topk)
    index: Any = {"head_dim": M3.dim, "gqa_ratio": M3.kv_heads, **INDEX, **M3.blocks}
    choice = Workload.of("block_selection", "decode", dtype="bfloat16", **index)
    for batch in (1, 32):
        made = partial(step, batch)
        yield Call(f"M3 decode attention, batch {batch}", one, SPLITS, made, 131072, (6,))
        made = partial(scores, batch)
        yield Call(f"M3 decode index, batch {batch}", choice, KEYS, made, 131072, (4,))
    long = attention_workload(MOBA, "selected_attention", "backward", block_size=MOBA.block)
    made = partial(selected_gradients, MOBA)
    name, outputs = "MoBA, blocks of 4096, backward, 32768", (8, 9, 10)
    yield Call(name, long, PARTS, made, 32768, outputs, MOBA.topk)


def launch_of(call: Call, knobs: Knobs, folder: Path) -> Callable[..., None]:
    algorithm = default_schedule(call.workload, SM90).algorithm
    return Run(FULL, folder).kernel(call.workload, algorithm, **knobs)


def check(call: Call, knobs: Knobs, folder: Path) -> dict[str, float]:
    """Compile a schedule, and compare its outputs with the float64 reference; what is wrong."""
    own = folder / f"{os.getpid()}"  # no process reads what another is writing
    own.mkdir(exist_ok=True)
    run, launch = Run(FULL, own), launch_of(call, knobs, own)
    sizes = replace(sizes_for(call.workload, call.topk), any_order=False)
    case = cases_of(call.workload).make_case(call.workload, sizes, "cuda", 1)
    launch(*case.args)
    for name, wanted in case.expected().items():
        out, what = case.outputs[name], f"{call.name}, {knobs}: {name}"
        if out.dtype.is_floating_point:
            run.agree(what, out, wanted)
        elif not torch.equal(out, wanted.to(out.device)):
            run.wrong[what] = math.inf
    launch(*call.arguments(8192))  # lengths that 16 divides are compiled for apart
    torch.cuda.synchronize()
    return run.wrong


def checked(listed: list[Call], folder: Path, seconds: float) -> dict[str, Any]:
    """What is wrong, or failed, of all schedules."""
    jobs = {  # the lengths of a call share a kernel
        (call.workload, call.arguments.args, str(knobs)): (call, knobs)
        for call in listed
        for knobs in call.schedules
    }
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(16, os.cpu_count() or 8), mp_context=context)
    futures = [
        (call, knobs, pool.submit(check, call, knobs, folder)) for call, knobs in jobs.values()
    ]
    wrong: dict[str, Any] = {}
    end = time.monotonic() + seconds
    for call, knobs, future in futures:
        try:
            wrong |= future.result(max(0.0, end - time.monotonic()))
        except Exception as error:
            wrong[f"{call.name}, {knobs}"] = f"{type(error).__name__}: {error}"[-400:]
    for process in list(getattr(pool, "_processes", {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return wrong


def timed(call: Call, folder: Path) -> Iterator[dict[str, Any]]:
    """A row a schedule: ms, whether its bits are the default's, and the memory that it took."""
    args = call.arguments(call.tokens)
    first: list[Tensor] = []
    for knobs in call.schedules:
        launch = launch_of(call, knobs, folder)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        launch(*args)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        found = [args[place].clone() for place in call.outputs]
        same = not first or all(map(torch.equal, found, first))
        first = first or found
        one = partial(launch, *args)
        ms = milliseconds(graphed(one, "cuda") if call.workload.pass_ == "decode" else one, "cuda")
        more = {"ms": ms, "default's bits": same, "MiB": peak >> 20}
        yield {"what": call.name, "knobs": knobs, **more}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("family_schedules.json"))
    parser.add_argument("--only", default="", help="calls whose names hold this text")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing after these")
    parser.add_argument("--dry", action="store_true", help="name the calls and schedules")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    listed = [call for call in calls() if args.only in call.name]
    if args.dry:
        for call in listed:
            print(call.name, call.workload, *call.schedules, sep="\n  ")
        return 0
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wrong = checked(listed, folder, 0.6 * args.seconds)
        print(f"compiled and checked, {end - time.monotonic():.0f} s left", flush=True)
        for call in listed:
            if time.monotonic() > end:
                wrong[call.name] = "no time left"
                continue
            for row in timed(call, folder):
                rows.append(row)
                print(json.dumps(row), flush=True)
            args.out.write_text(
                json.dumps({**facts, "rows": rows, "wrong": wrong}, indent=1) + "\n"
            )
            torch.cuda.empty_cache()
    print(json.dumps(wrong, indent=1))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
