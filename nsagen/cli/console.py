"""What commands print: tables on stdout, progress on stderr."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from nsagen.cli.verbosity import is_quiet
from nsagen.codegen.template import default_schedule
from nsagen.core.errors import BuildError, UnsupportedWorkloadError
from nsagen.core.target import parse_target
from nsagen.core.workload import Workload
from nsagen.spec import Spec

WIDE = 200
"""Columns to lay out for where no terminal cuts them off."""


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; NO_COLOR is honoured by rich."""
    stream = sys.stderr if stderr else sys.stdout
    narrow = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, width=None if narrow else WIDE)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, unless --quiet or no terminal; yields (what, how many, of how many)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        console=console(stderr=True),
        transient=True,
        disable=is_quiet() or not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(title, total=None, what="", visible=False)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, what=escape(what), visible=True)

        yield report


def inspection(spec: Spec) -> dict[str, Any]:
    """A spec's workloads and, for each target, the schedule used where nothing was measured."""
    return {
        "spec": spec.name,
        "description": spec.description,
        "passes": list(spec.passes),
        "targets": list(spec.targets),
        "attention_shapes": len(spec.attention_shapes()),
        "workloads": [
            {
                "op": workload.op,
                "pass": workload.pass_,
                "dtype": workload.dtype,
                "label": workload.label,
                "params": dict(workload.params),
                "schedules": {target: _schedule(workload, target) for target in spec.targets},
            }
            for workload in spec.workloads()
        ],
    }


def _schedule(workload: Workload, target: str) -> dict[str, Any] | None:
    """None where no template makes the workload."""
    try:
        schedule = default_schedule(workload, parse_target(target))
    except (BuildError, UnsupportedWorkloadError):
        return None
    return {"algorithm": schedule.algorithm, "knobs": dict(schedule.knobs)}


def print_inspection(content: dict[str, Any]) -> None:
    workloads = content["workloads"]
    title = (
        f"{content['spec']}: {len(workloads)} workloads of "
        f"{content['attention_shapes']} attention shapes"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("op", "pass", "workload"):
        table.add_column(heading, no_wrap=True)
    for target in content["targets"]:
        table.add_column(f"default schedule, {target}", overflow="fold")
    previous = None
    for row in workloads:
        group = (row["op"], row["pass"])
        if previous not in (None, group):
            table.add_section()
        names = group if group != previous else ("", "")
        schedules = [_schedule_text(row["schedules"][target]) for target in content["targets"]]
        table.add_row(*names, row["label"], *schedules)
        previous = group
    console().print(table)


def _schedule_text(schedule: dict[str, Any] | None) -> str:
    if schedule is None:
        return "no template covers it"
    knobs = ", ".join(f"{name}={value}" for name, value in schedule["knobs"].items())
    return f"{schedule['algorithm']}({knobs})"


def print_verification(rows: list[dict[str, Any]]) -> None:
    """One line an output of a kernel: its error beside the threshold."""
    table = Table(title="relative error against the float64 reference", title_justify="left")
    for heading in ("op", "workload", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("error", "threshold"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    styles = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
    for row in rows:
        error, threshold = (
            "" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "threshold")
        )
        note = f": {escape(row['note'])}" if row["note"] else ""
        result = f"[{styles[row['result']]}]{row['result']}[/]{note}"
        name = f"{row['op']} {row['pass']}"
        table.add_row(name, row["workload"], row["output"], error, threshold, result)
    console().print(table)


def print_implementation(name: str, setting: Any, device: Any, rows: list[dict[str, Any]]) -> None:
    """One line an output of each case that an implementation was put through."""
    sizes = ", ".join(f"{key} {value}" for key, value in vars(setting).items())
    table = Table(title=escape(f"{name} on {device}: {sizes}"), title_justify="left")
    for heading in ("case", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("error", "threshold"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    styles = {"ok": "green", "failed": "bold red", "refused": "red", "skipped": "yellow"}
    for row in rows:
        error, threshold = (
            "" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "threshold")
        )
        note = f": {escape(row['note'])}" if row["note"] else ""
        result = f"[{styles[row['result']]}]{row['result']}[/]{note}"
        table.add_row(row["case"], row["output"], error, threshold, result)
    console().print(table)
    counts = Counter(row["result"] for row in rows)
    console().print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())))


def print_diagnosis(diagnosis: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in diagnosis["facts"].items():
        table.add_row(name, escape("none" if value is None else str(value)))
    out = console()
    out.print(table)
    for heading in ("notes", "problems"):
        for text in diagnosis[heading]:
            out.print(f"{heading[:-1]}: {text}", markup=False, highlight=False, soft_wrap=True)
    if not diagnosis["problems"]:
        out.print("no problems found")
