"""Gradient pipelines of small groups beside two_passes, their default: check and time all at once.

    python benchmarks/small_groups.py --out small_groups.json

One sequence of 64 query heads in groups of 8 and 4, head_dim 128, bfloat16, of 8192, 32768 and
65536 tokens: compressed attention's gradients (windows of 32 by 16) and, for groups of 4, the
sliding window's (512). Small batches, with gates of any sign and without, are compared with
float64, large ones with two_passes. Times are medians of rounds that take all schedules in turns,
the L2 cache cleared before each call. Meant for one minute on an H200. Exits 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from forced_and_union import SM90, Launch, Variant, compiled, write
from torch import Tensor

from nsagen.bench.shape import Inputs, Shape
from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.codegen.template import space_for
from nsagen.core.importing import import_file
from nsagen.core.workload import Schedule

SEQLENS = (8192, 32768, 65536)
PASSES = (
    ("compressed_attention", 8),
    ("compressed_attention", 4),
    ("sliding_window_attention", 4),
)
HIDES = ("gradients", "scores")
RAGGED = (700, 0, 31, 1, 1033, 7)
LIMIT = THRESHOLDS[torch.bfloat16]


def shape_of(group: int) -> Shape:
    return dataclasses.replace(Shape(), gqa_ratio=group, kv_heads=64 // group)


def variants(op: str, group: int, hides: Sequence[str]) -> dict[str, Variant]:
    """The forward pass, two_passes, and the pipeline with its masks of each kind."""
    forward, w = (shape_of(group).workload(op, pass_) for pass_ in ("forward", "backward"))
    pipeline = dict(space_for(w, "warp_specialized").default_schedule(w, SM90).knobs)
    return {
        "forward": (
            forward,
            space_for(forward, "warp_specialized").default_schedule(forward, SM90),
        ),
        "two_passes": (w, space_for(w, "two_passes").default_schedule(w, SM90)),
        **{
            f"pipeline, hide {hide}": (w, Schedule.of("warp_specialized", pipeline, hide=hide))
            for hide in hides
        },
    }


def small_errors(launches: Mapping[str, Launch], found: Mapping[str, Variant]) -> dict[str, float]:
    """Against float64, relative to the threshold, with gates of any sign and without."""
    errors = {}
    for name in (name for name in launches if name != "forward"):
        w = found[name][0]
        for gated in (False, True):
            case = cases_of(w).make_case(w, Sizes(RAGGED, 2), "cuda", seed=1)
            do, *middle, o, lse, dq, dk, dv, scale = case.args
            args: tuple[Any, ...] = (do, *middle, o, lse, dq, dk, dv, scale)
            if gated:
                gate = torch.randn(lse.shape, device="cuda")
                delta = (do.float() * o.float()).sum(-1)
                args = (do.clone(), *middle, None, lse, dq, dk, dv, scale, delta, gate)
            launches[name](*args)
            if gated:
                do *= gate[..., None]
            for key, expected in case.expected().items():
                label = f"{name}{', gated' if gated else ''}: {key}"
                errors[label] = relative_error(case.outputs[key], expected) / LIMIT
    return errors


def large(op: str, group: int, tokens: int, forward: Launch) -> tuple[Any, dict[str, Tensor]]:
    """The arguments of a backward pass, and its gradients."""
    x = Inputs.random(shape_of(group), tokens)
    windows = op == "compressed_attention"
    keys = (x.ck, x.cv) if windows else (x.k, x.v)
    seqlens = (x.cu_seqlens, x.window_cu_seqlens) if windows else (x.cu_seqlens,)
    o, lse = torch.empty_like(x.q), torch.empty(x.q.shape[:2], device="cuda")
    scale = float(x.q.shape[2] ** -0.5)
    forward(x.q, *keys, *seqlens, o, lse, scale)
    names, leaves = ("dq", "dk", "dv"), (x.q, *keys)
    gradients: dict[str, Tensor] = dict(zip(names, map(torch.empty_like, leaves), strict=True))
    do = torch.randn_like(x.q)
    return (do, x.q, *keys, *seqlens, o, lse, *gradients.values(), scale), gradients


def medians(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, of rounds in which they take turns."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def measure(
    launches: Mapping[str, Launch], op: str, group: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """A row: milliseconds, and errors beside two_passes relative to the threshold."""
    timed = {name: launch for name, launch in launches.items() if name != "forward"}
    args, gradients = large(op, group, tokens, launches["forward"])
    errors: dict[str, float] = {}
    plain: dict[str, Tensor] = {}
    for name, launch in timed.items():
        found = []
        for _ in range(2):
            for gradient in gradients.values():
                gradient.fill_(float("nan"))
            launch(*args)
            found.append({key: gradient.clone() for key, gradient in gradients.items()})
        plain = plain or found[0]
        for key, gradient in found[0].items():
            same = torch.equal(gradient, found[1][key])
            error = relative_error(gradient, plain[key].double()) / LIMIT
            errors[f"{name}: {key}"] = error if same else float("inf")
    ms = medians({n: functools.partial(launch, *args) for n, launch in timed.items()}, rounds)
    return {"op": op, "group": group, "tokens": tokens, "ms": ms, "errors": errors}


def run(
    folder: Path,
    passes: Sequence[tuple[str, int]],
    seqlens: Sequence[int],
    rounds: int,
    hides: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """What the JSON file holds, which is written after each row: versions, rows, wrong results and
    resources."""
    every = {of: variants(*of, hides) for of in passes}
    paths = {of: {n: write(folder, n, v) for n, v in found.items()} for of, found in every.items()}
    content: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{"rows": [], "wrong": {}, "errors": {}, "resources": {}},
    }

    def add(name: str, errors: Mapping[str, float]) -> None:
        content["errors"] |= {f"{name}, {key}": error for key, error in errors.items()}
        content["wrong"] = {n: e for n, e in content["errors"].items() if not e <= 1.0}
        out.write_text(json.dumps(content, indent=1) + "\n")

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, spawn) as pool:
        jobs = {
            of: {name: pool.submit(compiled, (paths[of][name], v[0])) for name, v in found.items()}
            for of, found in every.items()
        }
        for (op, group), found in every.items():
            label = f"{op}, group {group}"
            made = {name: job.result() for name, job in jobs[op, group].items()}
            content["resources"] |= {f"{label}, {name}": x for name, x in made.items()}
            print(f"{label}: compiled", flush=True)
            launches = {name: import_file(path).launch for name, path in paths[op, group].items()}
            add(label, small_errors(launches, found))
            for tokens in seqlens:
                row = measure(launches, op, group, tokens, rounds)
                content["rows"].append(row)
                add(f"{label}, {tokens}", row["errors"])
                times = ", ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
                print(f"{op}, groups of {group}, {tokens} tokens, ms: {times}", flush=True)
                torch.cuda.empty_cache()
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)
    parser.add_argument("--groups", type=int, nargs="+", choices=(8, 4), default=(8, 4))
    ops = sorted({op for op, _ in PASSES})
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--hides", nargs="+", choices=HIDES, default=HIDES, help="masks")
    parser.add_argument("--out", type=Path, default=Path("small_groups.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's file when it compiles
        passes = [of for of in PASSES if of[0] in args.ops and of[1] in args.groups]
        content = run(Path(folder), passes, args.seqlens, args.rounds, args.hides, args.out)
    print(f"over their threshold: {content['wrong'] or 'none'}")
    return bool(content["wrong"])


if __name__ == "__main__":
    sys.exit(main())
