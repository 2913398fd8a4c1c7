"""Compressed attention's gradients by stored ds, in workspaces of several sizes: check and time.

    python benchmarks/stored_ds.py --out stored_ds.json

One sequence of 64 query heads over 4, head_dim 128, bfloat16, windows of 32 by 16, beside the
default. Small batches are compared with float64, with gates of any sign and without; large ones
with the default, twice for the bits. Medians of rounds that take all forms in turns, cold L2 cache.
Rows are written as they come. Meant for a minute on an H200. Exits 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from forced_and_union import SM90, Variant, compiled, write
from small_groups import measure, shape_of, small_errors

from nsagen.bench.results import provenance
from nsagen.codegen.template import space_for
from nsagen.core.importing import import_file
from nsagen.core.workload import Schedule

OP, GROUP = "compressed_attention", 16
SEQLENS = (65536, 131072, 32768, 8192, 2048)
# (MiB of ds, programs of a range, what masks change), the first as it was measured before.
FORMS = (
    *((2048, 2048, "gradients"), (1024, 1024, "gradients"), (512, 512, "gradients")),
    *((512, 1024, "gradients"), (1024, 1024, "scores"), (512, 512, "scores"), (256, 512, "scores")),
)


def variants() -> dict[str, Variant]:
    shape = shape_of(GROUP)
    forward, w = (shape.workload(OP, pass_) for pass_ in ("forward", "backward"))

    def default(workload: Any, algorithm: str) -> Schedule:
        return space_for(workload, algorithm).default_schedule(workload, SM90)

    stored = dict(default(w, "stored_ds").knobs)
    found = {
        "forward": (forward, default(forward, "warp_specialized")),
        "warp_specialized": (w, default(w, "warp_specialized")),
    }
    for workspace, programs, hide in FORMS:
        knobs = stored | {"workspace": workspace, "programs": programs, "hide": hide}
        name = f"stored_ds, {workspace} MiB, {programs} programs, hide {hide}"
        found[name] = (w, Schedule.of("stored_ds", knobs))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("stored_ds.json"))
    args = parser.parse_args()
    found, spawn = variants(), multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,  # Triton reads a kernel's file when it compiles
        ProcessPoolExecutor(12, spawn) as pool,
    ):
        paths = {n: write(Path(name), n, variant) for n, variant in found.items()}
        jobs = {n: pool.submit(compiled, (paths[n], v[0])) for n, v in found.items()}
        content: dict[str, Any] = {"provenance": provenance(), "rows": []}
        content["resources"] = {n: job.result() for n, job in jobs.items()}
        launches = {n: import_file(path).launch for n, path in paths.items()}
        # The others differ from these in their ranges, which large batches show.
        apart = {v[1].algorithm + str(dict(v[1].knobs).get("hide")): n for n, v in found.items()}
        some = {n: launches[n] for n in apart.values()}
        content["errors"] = small_errors(some, found)
        for tokens in args.seqlens:
            content["rows"].append(measure(launches, OP, GROUP, tokens, args.rounds))
            print(content["rows"][-1], flush=True)
            args.out.write_text(json.dumps(content, indent=1) + "\n")
            torch.cuda.empty_cache()
    errors = [content["errors"], *(row["errors"] for row in content["rows"])]
    wrong = {n: e for some in errors for n, e in some.items() if not e <= 1.0}
    print(f"over their threshold: {wrong or 'none'}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
