"""Time every valid schedule of an op's forward or decode pass on this GPU.

    python benchmarks/sweep.py selected_attention forward --seqlen 16384 --minutes 2

Each schedule's outputs are compared with the default schedule's before its time counts.
Prints the ten fastest beside the default and writes one JSON row a schedule.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import KV_HEADS, milliseconds, target_name, workload_of, write_results

from nsagen.codegen.compile import load_module
from nsagen.codegen.target import parse_target
from nsagen.codegen.template import default_schedule, kernel_name, render, spaces_of
from nsagen.harness.base import Sizes, harness_of, relative_error
from nsagen.workload import Schedule, Workload

TOLERANCE = 1e-2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("op")
    parser.add_argument("pass_", metavar="pass", choices=("forward", "backward", "decode"))
    parser.add_argument("--seqlen", type=int, default=16384, help="tokens (decode: context)")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--kv-heads", type=int, default=KV_HEADS)
    parser.add_argument("--minutes", type=float, default=2.0, help="stop after this long")
    parser.add_argument("--set", action="append", default=[], metavar="PARAM=VALUE")
    return parser.parse_args()


def candidates(workload: Workload) -> list[Schedule]:
    """The default first, then all other valid schedules in a fixed random order."""
    target = parse_target(target_name())
    default = default_schedule(workload, target)
    others = [
        schedule
        for space in spaces_of(workload.op, workload.pass_)
        if space.supports(workload)
        for schedule in space.schedules(workload, target)
        if schedule != default
    ]
    random.Random(0).shuffle(others)
    return [default, *others]


def measure(workload: Workload, schedule: Schedule, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """One schedule's time and outputs; a schedule that fails has its reason instead."""
    row: dict[str, Any] = {"schedule": str(schedule)}
    try:
        path = folder / f"{kernel_name(workload, schedule)}.py"
        path.write_text(render(workload, schedule, f"# {schedule}"))
        module = load_module(path)
        case = harness_of(workload).make_case(workload, sizes, "cuda")
        module.launch(*case.args)
        torch.cuda.synchronize()
        row["outputs"] = {name: out.clone() for name, out in case.outputs.items()}
        row["ms"] = milliseconds(lambda: module.launch(*case.args))
        row["tflops"] = case.cost.flops / row["ms"] / 1e9
        row["tb_per_s"] = case.cost.bytes / row["ms"] / 1e9
    except Exception as error:  # any failure disqualifies this schedule only
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def sweep(
    workload: Workload, schedules: list[Schedule], sizes: Sizes, seconds: float
) -> list[dict[str, Any]]:
    """Rows of the schedules that were reached in time; the default's is the first."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    expected: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for schedule in schedules:
            row = measure(workload, schedule, sizes, Path(folder))
            outputs = row.pop("outputs", {})
            expected = expected or outputs
            row["error_vs_default"] = max(
                (relative_error(outputs[name], expected[name]) for name in outputs), default=0.0
            )
            rows.append(row)
            if time.monotonic() > end:
                break
    return rows


def main() -> None:
    args = arguments()
    changes = {k: int(v) if v.isdigit() else v for k, v in (s.split("=") for s in args.set)}
    workload = workload_of(args.op, args.pass_, **changes)
    lengths = (args.seqlen - (args.pass_ == "decode"),) * args.batch
    sizes = Sizes(lengths, args.kv_heads, capacity=args.seqlen)
    schedules = candidates(workload)
    rows = sweep(workload, schedules, sizes, 60 * args.minutes)
    good = [r for r in rows if "ms" in r and r["error_vs_default"] < TOLERANCE]
    print(f"{workload} N={args.seqlen} x{args.batch}: {len(rows)} of {len(schedules)} schedules")
    print(f"  default: {rows[0]}")
    for row in sorted(good, key=lambda row: row["ms"])[:10]:
        print(f"  {row['ms']:8.4f} ms  {row['tflops']:6.0f} TFLOP/s  {row['schedule']}")
    for row in [r for r in rows if r not in good][:5]:
        print(f"  disqualified: {row}")
    write_results(f"sweep-{args.op}-{args.pass_}-{args.seqlen}x{args.batch}", rows)


if __name__ == "__main__":
    main()
