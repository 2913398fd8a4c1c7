"""Forced blocks once, and unions of neighbours' blocks: check and time both beside today's kernels.

    python benchmarks/forced_and_union.py --out forced_and_union.json

One sequence of 64 query heads over 4, head_dim 128, blocks of 64, topk 16, window 512, bfloat16, in
8192, 32768 and 65536 tokens, with random and with learned selections; --group and --head-dim change
the heads of the 4 groups. Kernels are first compiled in
processes of their own; then small batches are compared with the float64 reference, and large ones
with today's kernels. Meant for two minutes on an H200. Exits 1 if a result is wrong or does not
repeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from nsagen.aot.compile import compile_variant
from nsagen.bench.measure import milliseconds
from nsagen.bench.selections import SELECTIONS, learned_selection
from nsagen.bench.shape import Inputs, Shape
from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.codegen.template import kernel_name, render, space_for
from nsagen.core.importing import import_file
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload

SEQLENS = (8192, 32768, 65536)
SHAPE = Shape()
SM90 = KNOWN_TARGETS["cuda:90"]
BLOCKS = {"init_blocks": SHAPE.init_blocks, "local_blocks": SHAPE.local_blocks}
RAGGED = (1000, 0, 5, 63, 64, 65, 1303)

Variant = tuple[Workload, Schedule]
Launch = Callable[..., None]


def variant(
    op: str, algorithm: str, shape: Shape = SHAPE, *, forced: bool, **knobs: Any
) -> Variant:
    """A workload, and an algorithm's default schedule with some knobs changed."""
    w = shape.workload(op, "forward")
    if forced:
        more = BLOCKS | ({"block_size": shape.block_size} if op.startswith("sliding") else {})
        w = Workload.of(op, "forward", dtype=w.dtype, **dict(w.params), **more)
    schedule = space_for(w, algorithm).default_schedule(w, SM90)
    return w, Schedule.of(algorithm, dict(schedule.knobs), **knobs)


def variants(shape: Shape) -> dict[str, Variant]:
    """What is timed, by name; the first two are what was there before."""
    selected, sliding = "selected_attention", "sliding_window_attention"
    found = {
        "sliding": variant(sliding, "warp_specialized", shape, forced=False),
        "selected": variant(selected, "query_major", shape, forced=False),
        "window and forced": variant(sliding, "forced_blocks", shape, forced=True),
        "free, query_major": variant(selected, "query_major", shape, forced=True),
    }
    for choice in ("call", "tile"):
        found[f"free, union by {choice}"] = variant(
            selected, "union_tiles", shape, forced=True, choice=choice
        )
    found["selected, union"] = variant(selected, "union_tiles", shape, forced=False)
    return found


def small_variants() -> dict[str, Variant]:
    """More shapes that are checked, not timed."""
    found = {}
    for group, dim in ((4, 128), (8, 64), (8, 256), (6, 128), (32, 128)):
        shape = dataclasses.replace(SHAPE, gqa_ratio=group, head_dim=dim, v_head_dim=dim)
        for forced in (False, True):
            name = f"group {group}, head_dim {dim}{', forced' if forced else ''}"
            found[f"union, {name}"] = variant(
                "selected_attention", "union_tiles", shape, forced=forced
            )
        if dim <= 128 and 128 % group == 0:
            op = "sliding_window_attention"
            found[f"window, {name}"] = variant(op, "forced_blocks", shape, forced=True)
    for window in (32, 100, 128):
        shape = dataclasses.replace(SHAPE, window_size=window)
        op = "sliding_window_attention"
        found[f"window of {window}"] = variant(op, "forced_blocks", shape, forced=True)
    return found


def write(folder: Path, name: str, found: Variant) -> Path:
    path = folder / f"{kernel_name(*found)}.py"
    path.write_text(render(*found, header=f"# {name}: {found[0]}: {found[1]}"))
    return path


def compiled(job: tuple[Path, Workload]) -> list[dict[str, Any]]:
    """Fill Triton's cache, in a process of its own; what each kernel uses."""
    return [dataclasses.asdict(x) for x in compile_variant(*job, SM90)]


def outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, device=q.device)


def check_small(launches: dict[str, Launch], found: dict[str, Variant]) -> dict[str, float]:
    """The largest relative error of each kernel's outputs, against float64."""
    errors = {}
    for name, launch in launches.items():
        w = found[name][0]
        case = cases_of(w).make_case(w, Sizes(RAGGED, 2), "cuda", seed=1)
        launch(*case.args)
        for output, expected in case.expected().items():
            error = relative_error(case.outputs[output], expected)
            errors[f"{name}: {output}"] = error / THRESHOLDS[case.outputs[output].dtype]
    return errors


class Calls:
    """The calls of one length and selection."""

    def __init__(
        self, launches: dict[str, Launch], shape: Shape, tokens: int, selection: str
    ) -> None:
        self.launches = launches
        x = self.inputs = Inputs.random(shape, tokens)
        if selection == "random":
            self.topk_idx = x.compressed()[1]
        else:
            self.topk_idx = learned_selection(shape.kv_heads, tokens, "cuda")
        self.other = torch.randn_like(x.q)
        self.outs = {name: outputs(x.q) for name in ("window", "forced", "selected", "sum")}
        self.scale = shape.head_dim**-0.5

    def sliding(self, gated: bool) -> None:
        x, name = self.inputs, "sum" if gated else "window"
        more = (None, None, self.other, self.outs["selected"][0], x.gate) if gated else ()
        self.launches["sliding"](x.q, x.k, x.v, x.cu_seqlens, *self.outs[name], self.scale, *more)

    def window_and_forced(self) -> None:
        x = self.inputs
        more = (None, None, *self.outs["forced"])
        args = (x.q, x.k, x.v, x.cu_seqlens, *self.outs["window"], self.scale, *more)
        self.launches["window and forced"](*args)

    def selected(self, name: str, gated: bool = False) -> None:
        x, to = self.inputs, "sum" if gated else "selected"
        more: tuple[Any, ...] = ()
        if name.startswith("free"):
            more = (None, None, *self.outs["forced"])
            more += (self.other, self.outs["window"][0], x.gate) if gated else ()
        args = (x.q, x.k, x.v, self.topk_idx, x.cu_seqlens, *self.outs[to], self.scale, *more)
        self.launches[name](*args)


def measure(
    launches: dict[str, Launch], shape: Shape, tokens: int, selection: str
) -> tuple[dict[str, float], dict[str, float]]:
    """(milliseconds of each call, errors against today's kernels relative to the threshold)."""
    calls, times, errors = Calls(launches, shape, tokens, selection), {}, {}
    calls.sliding(False)
    calls.selected("selected")
    today = {name: calls.outs[name][0].double() for name in ("window", "selected")}
    today_lse = calls.outs["selected"][1].double()
    calls.sliding(True)
    today_sum = calls.outs["sum"][0].double()
    calls.window_and_forced()
    limit = THRESHOLDS[torch.bfloat16]
    errors["window"] = relative_error(calls.outs["window"][0], today["window"]) / limit
    times["sliding"] = milliseconds(lambda: calls.sliding(False))
    times["sliding, gated sum"] = milliseconds(lambda: calls.sliding(True))
    times["window and forced"] = milliseconds(calls.window_and_forced)
    for name in (n for n in launches if n.startswith(("free", "selected"))):
        calls.selected(name)
        first = [x.clone() for x in calls.outs["selected"]]
        errors[name] = relative_error(first[0], today["selected"]) / limit
        errors[f"{name}: lse"] = relative_error(first[1], today_lse) / limit
        calls.selected(name)
        same = all(torch.equal(*pair) for pair in zip(first, calls.outs["selected"], strict=True))
        errors[f"{name}: repeats"] = 0.0 if same else float("inf")
        times[name] = milliseconds(lambda name=name: calls.selected(name))
        if name.startswith("free"):
            calls.selected(name, gated=True)
            # The other branches' outputs differ in rounding, as does this one's.
            errors[f"{name}: sum"] = relative_error(calls.outs["sum"][0], today_sum) / limit
            times[f"{name}, gated sum"] = milliseconds(lambda name=name: calls.selected(name, True))
    pairs = {n: n + ", gated sum" for n in times if n.startswith("free") and "gated" not in n}
    times["prefill today"] = times["selected"] + times["sliding, gated sum"]
    times["train today"] = times["selected"] + times["sliding"]
    times["prefill new"] = times["window and forced"] + min(times[n] for n in pairs.values())
    times["train new"] = times["window and forced"] + min(times[n] for n in pairs)
    return times, errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)
    parser.add_argument("--group", type=int, default=SHAPE.gqa_ratio)
    parser.add_argument("--head-dim", type=int, default=SHAPE.head_dim)
    parser.add_argument("--out", type=Path, default=Path("forced_and_union.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's file when it compiles
        dim = args.head_dim
        shape = dataclasses.replace(SHAPE, gqa_ratio=args.group, head_dim=dim, v_head_dim=dim)
        content = run(Path(folder), shape, args.seqlens)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    rows = content["rows"]
    print(f"{'ms':28s}" + "".join(f"{r['tokens']:>8} {r['selection']:8s}" for r in rows))
    for name in rows[0]["ms"]:
        print(f"{name:28s}" + "".join(f"{row['ms'][name]:8.3f} {'':8s}" for row in rows))
    print(f"errors over their threshold: {content['wrong'] or 'none'}; written to {args.out}")
    return bool(content["wrong"])


def run(folder: Path, shape: Shape, seqlens: Sequence[int]) -> dict[str, Any]:
    """What the JSON file holds: versions, times, errors over thresholds, and kernels' resources."""
    timed = variants(shape)
    every = timed | small_variants()
    paths = {name: write(folder, name, found) for name, found in every.items()}
    jobs = [(paths[name], every[name][0]) for name in every]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        resources = dict(zip(every, pool.map(compiled, jobs), strict=True))
    launches = {name: import_file(path).launch for name, path in paths.items()}
    errors = check_small(launches, every)
    rows = []
    for tokens in seqlens:
        for selection in SELECTIONS:
            times, found = measure({n: launches[n] for n in timed}, shape, tokens, selection)
            rows.append({"tokens": tokens, "selection": selection, "ms": times})
            errors |= {f"{tokens} {selection}, {name}": x for name, x in found.items()}
            gc.collect()
            torch.cuda.empty_cache()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": dataclasses.asdict(shape),
        "rows": rows,
        "wrong": {name: error for name, error in errors.items() if not error <= 1.0},
        "errors": errors,
        "resources": resources,
    }


if __name__ == "__main__":
    sys.exit(main())
