"""Time what tuning records chose on all workloads of the same op and pass, to find default rules.

    python benchmarks/default_rules.py llama8b --out default_rules.json

A default is one rule for many workloads, so a schedule that won for one is timed on its siblings.
Candidates are the defaults and the records' winners and runners-up. The table says how much slower
each candidate is than the fastest one: the mean and the worst over workloads and sizes.
Every candidate is checked against the reference. Runs on a GPU; compiles on all cores; rows are
written as they come.
With --group, workloads have groups of so many heads instead of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsagen.codegen.template import default_schedule, kernel_name, space_for, spaces_for
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.releases import installed_release
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.records.files import load_folder
from nsagen.tune.compiler import Compiler
from nsagen.tune.measure import GpuMeasurer
from nsagen.tune.task import Task, tasks_of

SM90 = KNOWN_TARGETS["cuda:90"]
RECORDS = Path(__file__).parents[1] / "specs" / "tuned"

Pass = tuple[str, str]
Jobs = dict[tuple[Task, Schedule], Future[Any]]


def candidates(
    spec: str, ops: list[str], group: int | None
) -> dict[Pass, tuple[list[Workload], list[Schedule]]]:
    """Each op's and pass's workloads and schedules, as its records and defaults have them."""
    found: dict[Pass, tuple[dict[Workload, None], dict[Schedule, None]]] = {}
    for records in load_folder(RECORDS / spec):
        for r in records.records:
            if ops and r.workload.op not in ops:
                continue
            key = (r.workload.op, r.workload.pass_)
            workloads, schedules = found.setdefault(key, ({}, {}))
            w = with_group(r.workload, group)
            workloads[w] = None
            timed = [r.schedule, *(x.schedule for x in (r.runner_up, r.default) if x is not None)]
            schedules |= dict.fromkeys((*defaults_of(w), *timed))
            found[key] = workloads, schedules
    return {
        key: (list(workloads), list(schedules)) for key, (workloads, schedules) in found.items()
    }


def with_group(workload: Workload, group: int | None) -> Workload:
    """The workload with groups of so many heads, if it has groups."""
    params = dict(workload.params)
    if group is None or "gqa_ratio" not in params:
        return workload
    params["gqa_ratio"] = group
    return Workload.of(workload.op, workload.pass_, dtype=workload.dtype, **params)


def defaults_of(workload: Workload) -> list[Schedule]:
    """The default, and that of every other algorithm that covers the workload on Hopper."""
    spaces = spaces_for(workload, SM90, installed_release())
    schedules = [default_schedule(workload, SM90)]
    for space in spaces:
        with suppress(UnsupportedWorkloadError):
            schedules.append(space.default_schedule(workload, SM90))
    return schedules


def covers(workload: Workload, schedule: Schedule) -> bool:
    """Whether today's space of the schedule's algorithm has it for the workload."""
    try:
        space = space_for(workload, schedule.algorithm)
    except UnsupportedWorkloadError:
        return False
    return not space.violations(workload, schedule, SM90)


@functools.cache
def compiler() -> Compiler:
    return Compiler()


def compiled(folder: Path, task: Task, schedule: Schedule) -> int:
    """Fill Triton's cache, in a process of its own; words of stack in the kernels' loops."""
    path = path_of(folder, task, schedule)
    sizes = (task.timed, task.checked)
    kernels = compiler().compile(path, task.workload, schedule, str(SM90), sizes).kernels
    return sum(kernel["loop_spills"] or 0 for kernel in kernels)


def path_of(folder: Path, task: Task, schedule: Schedule) -> Path:
    return folder / f"{kernel_name(task.workload, schedule)}.py"


def measured(
    folder: Path, gpu: GpuMeasurer, jobs: Jobs, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each task and schedule, while time is left."""
    start = time.monotonic()
    for (task, schedule), job in jobs.items():
        if time.monotonic() - start > seconds:
            return
        row: dict[str, Any] = {"workload": str(task.workload), "sizes": task.sizes_text}
        row |= {"schedule": str(schedule)}
        row["default"] = schedule == default_schedule(task.workload, SM90)
        try:
            row["loop_spills"] = job.result()
            gpu.open(task)
            row["ms"] = round(gpu.measure(path_of(folder, task, schedule), None).ms, 5)
        except Exception as error:  # a candidate that fails is a result
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Slowdowns against each task's fastest candidate: mean and worst, by pass and candidate."""
    best: dict[str, float] = {}
    for row in rows:
        if "ms" in row:
            best[task_of(row)] = min(row["ms"], best.get(task_of(row), row["ms"]))
    slower: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if "ms" in row:
            name = row["workload"].rpartition(" ")[0]
            slower[name, row["schedule"]].append(row["ms"] / best[task_of(row)])
            if row["default"]:
                slower[name, "today's defaults"].append(row["ms"] / best[task_of(row)])
    lines = []
    for name in dict.fromkeys(name for name, _ in slower):
        lines.append(name)
        ranked = sorted(
            (statistics.geometric_mean(x), max(x), len(x), schedule)
            for (other, schedule), x in slower.items()
            if other == name
        )
        lines += [f"  {mean:5.2f} {worst:5.2f} {n:3d}  {s}" for mean, worst, n, s in ranked]
    return "\n".join(lines)


def task_of(row: dict[str, Any]) -> str:
    return f"{row['workload']}, {row['sizes']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spec", help="whose tuning records to read, e.g. llama8b")
    parser.add_argument("--ops", nargs="+", default=[], help="only these, e.g. compress")
    parser.add_argument("--group", type=int, help="query heads of a group, instead of the spec's")
    parser.add_argument("--jobs", type=int, help="processes that compile; default: every core")
    parser.add_argument("--compile", action="store_true", help="fill Triton's cache, time nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop measuring after these")
    parser.add_argument("--out", type=Path, default=Path("default_rules.json"))
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(args.jobs, spawn) as pool:
        jobs: Jobs = {
            (task, schedule): pool.submit(compiled, Path(name), task, schedule)
            for workloads, schedules in candidates(args.spec, args.ops, args.group).values()
            for task in tasks_of(workloads)
            for schedule in schedules
            if covers(task.workload, schedule)
        }
        print(f"{len(jobs)} candidates", flush=True)
        if args.compile:
            failed = sum(job.exception() is not None for job in jobs.values())
            print(f"compiled, {failed} failed")
            return bool(failed)
        gpu, rows = GpuMeasurer(), []
        about = json.dumps(gpu.identify())
        for row in measured(Path(name), gpu, jobs, 60 * args.minutes):
            rows.append(row)
            lines = ",\n".join(map(json.dumps, rows))
            args.out.write_text(f'{{"gpu": {about}, "rows": [\n{lines}\n]}}\n')
        pool.shutdown(cancel_futures=True)
    print(table(rows))
    wrong = [row for row in rows if "error" in row]
    for row in wrong:
        print(f"{task_of(row)}, {row['schedule']}: {row['error']}")
    print(f"{len(rows)} of {len(jobs)} measured, {len(wrong)} failed; written to {args.out}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
