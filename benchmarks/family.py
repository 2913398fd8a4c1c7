"""MiniMax-M3's and MiniCPM4's layers: check every kernel, and time them beside dense attention.

    python benchmarks/family.py --out family.json          # on an H200: two and a half minutes
    python benchmarks/family.py --dry --out family.json    # tiny sizes on a CPU, by the references

Kernels are first compiled on all cores, each process its share, and those of the family's specs
verified: verify_family.json beside --out has a row an output. Then they are timed one after
another. What fails is in `failed`, what there was no time for in `skipped`. Exits 1 if a result is
wrong or a part failed. With --plot, draws the JSON:

    python benchmarks/family.py --plot docs/images/family.png
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from family_attention import (
    dense,
    m3_attention,
    m3_decode,
    m3_index,
    m3_index_loss,
    m3_shared,
    minicpm_64_blocks,
    minicpm_forward,
    moba,
    narrow_decode,
)
from family_models import m3_in_transformers, small_models
from family_plot import draw
from family_run import FULL, TINY, WARM, Run, Sizes

RESULTS = Path(__file__).parent / "results"


GOALS = {
    "M3 index and top-k": {8192: 0.18, 32768: 1.4, 131072: 20.0},
    "M3 attention forward": {8192: 2.8, 32768: 12.8, 131072: 57.0},
    "M3 attention backward": {8192: 5.3, 32768: 22.0},
    "M3 layer in Transformers": {8192: 9.0},
    "M3 decode, batch 1": {131072: 0.037},
    "M3 decode, batch 32": {32768: 0.133, 131072: 0.318},
    "MiniCPM attention forward": {131072: 65.0},
    "MiniCPM forward with scores": {131072: 90.0},
    "MiniCPM 64 blocks forward": {262144: 158.0},
    "MiniCPM 64 blocks backward": {262144: 469.0},
}
"""Milliseconds, by what and tokens in all; 262144 are two sequences."""

PUBLISHED = {
    "vLLM 0.33, Triton, H200, another run": {
        "M3 attention forward": {8192: 3.81, 32768: 16.8, 131072: 73.8},
        "M3 index and top-k": {8192: 0.22, 32768: 1.8, 131072: 27.2},
        "M3 decode, batch 1": {131072: 0.037},
        "M3 decode, batch 32": {32768: 0.133, 131072: 0.318},
    },
    "InfLLM-V2's kernels, H100, published": {
        "MiniCPM 64 blocks forward": {262144: 158.0},
        "MiniCPM 64 blocks backward": {262144: 469.0},
    },
    "FlashAttention-2, H100, published beside them": {
        "MiniCPM 64 blocks forward": {262144: 832.0},
        "MiniCPM 64 blocks backward": {262144: 2063.0},
    },
    "dense cuDNN, H200, another run": {
        "M3 attention forward": {8192: 1.93, 32768: 28.9, 131072: 500.0},
        "M3 attention backward": {8192: 5.48, 32768: 81.6, 131072: 1300.0},
    },
}
"""Milliseconds that were not measured in this run."""


PARTS: dict[str, Callable[[Run], None]] = {
    "m3_decode": m3_decode,
    "m3_attention": m3_attention,
    "m3_index": m3_index,
    "m3_index_loss": m3_index_loss,
    "minicpm_forward": minicpm_forward,
    "m3_in_transformers": m3_in_transformers,
    "dense": dense,
    "minicpm_64_blocks": minicpm_64_blocks,
    "moba": moba,
    "m3_shared": m3_shared,
    "narrow_decode": narrow_decode,
    "small_models": small_models,
}
"""What is measured, what matters most first."""


SPECS = ("moba", "minimax_m3", "minicpm4", "minicpm_sala")
"""Their kernels are compared with the float64 reference; what takes longest first."""


def compile_share(index: int, processes: int, parts: list[str], folder: Path) -> None:
    """Compile a process's share of the kernels of the parts' short calls; launch none."""
    from precompile import compiling

    run = Run(WARM, folder / f"share-{index}", times=False)
    run.folder.mkdir()  # no process reads what another is writing
    with compiling(index, processes) as mine:
        for part in parts:
            try:
                PARTS[part](run)
            except Exception:  # what this leaves is compiled while it is timed
                print(f"{part}:\n{traceback.format_exc(limit=-3)}", flush=True)
    print(f"process {index}: {sum(mine.values())} of {len(mine)} kernels", flush=True)


def verify_spec(name: str) -> list[dict[str, Any]]:
    """The rows of `nsagen verify`."""
    from nsagen.cases.verify import verify
    from nsagen.spec import load_spec

    return [{"spec": name, **row} for row in verify(load_spec(name))]


def wrong_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The error of each output that failed to verify."""
    return {
        f"{row['spec']}: {row['variant']} {row['output']}": (
            math.inf if row["error"] is None else row["error"]
        )
        for row in rows
        if row["result"] == "failed"
    }


def failure(error: BaseException) -> str:
    """What the results say of it; where it happened is printed."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def compile_and_verify(
    folder: Path, seconds: float, parts: list[str], specs: tuple[str, ...]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(failed, rows of verify) of all children; what takes too long counts as failed."""
    failed: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    cores = len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"))
    futures: dict[str, Future[Any]] = {
        f"verify {spec}": pool.submit(verify_spec, spec) for spec in specs
    }
    shares = max(1, cores - len(specs))
    for index in range(shares):
        job = pool.submit(compile_share, index, shares, parts, folder)
        futures[f"compile {index} of {shares}"] = job
    end = time.monotonic() + seconds
    for name, future in futures.items():
        try:
            rows += future.result(max(0.0, end - time.monotonic())) or []
        except Exception as error:
            failed[name] = failure(error)
    for process in list(getattr(pool, "_processes", {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return failed, rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal beside the best row of it."""
    found = []
    for what, by_tokens in GOALS.items():
        for tokens, goal in by_tokens.items():
            same = [r for r in rows if r["what"] == what and r["tokens"] == tokens]
            same = [r for r in same if not any(n in r["how"] for n in ("agree", "alone", "sdpa"))]
            best = min(same, key=lambda r: r["ms"], default=None)
            row = {"what": what, "tokens": tokens, "goal_ms": goal}
            if best is not None:
                row |= {"ms": best["ms"], "how": best["how"], "met": best["ms"] <= goal}
            found.append(row)
    return found


def run_all(
    sizes: Sizes,
    seconds: float,
    parts: list[str],
    specs: tuple[str, ...],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Run the parts, and save what the JSON file holds after each row and part.

    Args:
        seconds: after which nothing is begun.
        specs: that are verified, on a GPU.
    """
    start = time.monotonic()
    failed: dict[str, str] = {}
    verified: list[dict[str, Any]] = []
    versions = {"torch": torch.__version__, "triton": _triton()}
    device = torch.cuda.get_device_name() if sizes.device != "cpu" else "cpu"

    def write() -> None:
        save(
            {
                **{"device": device, **versions, "seconds": time.monotonic() - start},
                **{"rows": run.rows, "goals": goals(run.rows), "published": PUBLISHED},
                **{"wrong": run.wrong, "failed": failed, "skipped": run.skipped},
                "verified": verified,
            }
        )

    with tempfile.TemporaryDirectory() as name:  # Triton reads a kernel's file when it compiles
        run = Run(sizes, Path(name), end=start + seconds, each=write)
        if sizes.device != "cpu":
            made = [part for part in parts if part != "dense"]
            failed, verified = compile_and_verify(Path(name), 0.45 * seconds, made, specs)
            run.wrong = wrong_of(verified)
            print(f"compiled and verified in {time.monotonic() - start:.0f} s", flush=True)
        for part in parts:
            try:
                PARTS[part](run)
            except Exception as error:
                failed[part] = failure(error)
            gc.collect()
            if sizes.device != "cpu":
                torch.cuda.empty_cache()
            write()


def updated(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A run's results, and the rows of an earlier one for what this one did not measure.

    A row says which run it is from by `run`, an index into `runs`; without one it is of this run.
    """
    facts = ("device", "torch", "triton")
    fresh = {(row["what"], row["tokens"]) for row in now["rows"]}
    kept = [row for row in before["rows"] if (row["what"], row["tokens"]) not in fresh]
    runs = [*before.get("runs", []), {name: before[name] for name in facts}]
    kept = [{"run": len(runs) - 1, **row} for row in kept]
    rows = [*now["rows"], *kept]
    found = goals([row for row in rows if "ms" in row])
    return {**now, "rows": rows, "goals": found, "runs": runs if kept else []}


def _triton() -> str:
    import triton

    return triton.__version__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "nvidia-h200" / "family.json")
    parser.add_argument("--plot", type=Path, help="draw --out, which is there, and measure nothing")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--seconds", type=float, default=145.0, help="begin nothing after these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--no-verify", action="store_true", help="verify none of the specs")
    parser.add_argument(
        "--update",
        type=Path,
        help="results whose rows are kept where this run has none of the kind",
    )
    args = parser.parse_args()
    if args.plot:
        draw(json.loads(args.out.read_text()), args.plot)
        return 0
    seconds = math.inf if args.dry else args.seconds
    torch.set_num_threads(min(8, os.cpu_count() or 1))  # small models run on the CPU too
    specs = () if args.no_verify else SPECS
    before = json.loads(args.update.read_text()) if args.update else None
    content: dict[str, Any] = {}

    def save(found: dict[str, Any]) -> None:  # a run that is killed loses the row in flight
        nonlocal content
        if verified := found.pop("verified"):
            args.out.with_name("verify_family.json").write_text(
                json.dumps(verified, indent=1) + "\n"
            )
        content = updated(before, found) if before else found
        args.out.write_text(json.dumps(content, indent=1) + "\n")

    run_all(TINY if args.dry else FULL, seconds, args.parts, specs, save)
    for row in content["goals"]:
        print(json.dumps(row))
    for key in ("wrong", "failed", "skipped"):
        print(f"{key}: {json.dumps(content[key], indent=1)}")
    return bool(content["wrong"] or content["failed"])


if __name__ == "__main__":
    sys.exit(main())
