"""MiniMax-M3's and MiniCPM4's layers: check every kernel, and time them beside dense attention.

    python benchmarks/family.py --out family.json          # on an H200: two and a half minutes
    python benchmarks/family.py --dry --out family.json    # tiny sizes on a CPU, by the references

Kernels are first compiled, and those of the family's specs verified, in processes of their own:
verify_family.json beside --out has a row an output. Then they are timed one after another. What
fails is in `failed`, what there was no time for in `skipped`. Exits 1 if a result is wrong or a
part failed. With --plot, draws the JSON:

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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
    "m3_attention": m3_attention,
    "m3_index": m3_index,
    "m3_decode": m3_decode,
    "minicpm_forward": minicpm_forward,
    "minicpm_64_blocks": minicpm_64_blocks,
    "m3_in_transformers": m3_in_transformers,
    "m3_shared": m3_shared,
    "m3_index_loss": m3_index_loss,
    "dense": dense,
    "moba": moba,
    "small_models": small_models,
    "narrow_decode": narrow_decode,
}
"""What is measured, what matters most first."""


SPECS = ("moba", "minimax_m3", "minicpm4", "minicpm_sala")
"""Their kernels are compared with the float64 reference; what takes longest first."""


def child(kind: str, name: str, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Compile a part's kernels by short calls, or verify a spec.

    Returns:
        what is wrong, and the rows of `nsagen verify`.
    """
    run = Run(WARM, folder / f"{kind}-{name}", times=False)
    run.folder.mkdir()  # no process reads what another is writing
    rows: list[dict[str, Any]] = []
    if kind == "part":
        PARTS[name](run)
        torch.cuda.synchronize()
    else:
        from nsagen.cases.verify import verify
        from nsagen.spec import load_spec

        rows = [{"spec": name, **row} for row in verify(load_spec(name))]
        for row in rows:
            if row["result"] == "failed":
                error = row["error"] if row["error"] is not None else math.inf
                run.wrong[f"{name}: {row['variant']} {row['output']}"] = error
    return run.wrong, rows


def failure(error: BaseException) -> str:
    """What the results say of it; where it happened is printed."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def compile_and_verify(
    folder: Path, seconds: float, jobs: list[tuple[str, str]]
) -> tuple[dict[str, float], dict[str, str], list[dict[str, Any]]]:
    """(wrong, failed, rows of verify) of all children; what takes too long counts as failed."""
    wrong: dict[str, float] = {}
    failed: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(16, os.cpu_count() or 8), mp_context=context)
    futures = {job: pool.submit(child, *job, folder) for job in jobs}
    end = time.monotonic() + seconds
    for (kind, name), future in futures.items():
        try:
            of_child, of_spec = future.result(max(0.0, end - time.monotonic()))
            wrong |= of_child
            rows += of_spec
        except Exception as error:
            failed[f"{kind} {name}"] = failure(error)
    for process in list(getattr(pool, "_processes", {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return wrong, failed, rows


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
    sizes: Sizes, seconds: float, parts: list[str], specs: tuple[str, ...] = SPECS
) -> Iterator[dict[str, Any]]:
    """What the JSON file holds, after each part.

    Args:
        seconds: after which nothing is begun.
        specs: that are verified, on a GPU.
    """
    start = time.monotonic()
    failed: dict[str, str] = {}
    verified: list[dict[str, Any]] = []
    versions = {"torch": torch.__version__, "triton": _triton()}
    device = torch.cuda.get_device_name() if sizes.device != "cpu" else "cpu"
    with tempfile.TemporaryDirectory() as name:  # Triton reads a kernel's file when it compiles
        run = Run(sizes, Path(name), end=start + seconds)
        if sizes.device != "cpu":
            jobs = [("verify", spec) for spec in specs]
            jobs += [("part", part) for part in parts if part != "dense"]
            run.wrong, failed, verified = compile_and_verify(Path(name), 0.45 * seconds, jobs)
            print(f"compiled and verified in {time.monotonic() - start:.0f} s", flush=True)
        for part in parts:
            try:
                PARTS[part](run)
            except Exception as error:
                failed[part] = failure(error)
            gc.collect()
            if sizes.device != "cpu":
                torch.cuda.empty_cache()
            yield {
                **{"device": device, **versions, "seconds": time.monotonic() - start},
                **{"rows": run.rows, "goals": goals(run.rows), "published": PUBLISHED},
                **{"wrong": run.wrong, "failed": failed, "skipped": run.skipped},
                "verified": verified,
            }


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
    for found in run_all(TINY if args.dry else FULL, seconds, args.parts, specs):
        if verified := found.pop("verified"):
            args.out.with_name("verify_family.json").write_text(
                json.dumps(verified, indent=1) + "\n"
            )
        content = updated(before, found) if before else found
        args.out.write_text(json.dumps(content, indent=1) + "\n")  # a stopped run keeps its rows
    for row in content["goals"]:
        print(json.dumps(row))
    for key in ("wrong", "failed", "skipped"):
        print(f"{key}: {json.dumps(content[key], indent=1)}")
    return bool(content["wrong"] or content["failed"])


if __name__ == "__main__":
    sys.exit(main())
