"""What `nsagen tune` prints: a line of progress a schedule on stderr, then the records."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from nsagen.cli.console import print_line, progress_bar
from nsagen.cli.table import print_table
from nsagen.records.record import TuningRecord
from nsagen.tune.session import Result
from nsagen.tune.settings import Step


class Live:
    """Shows how a run goes on: a bar on a terminal, else a line a decided task."""

    def __init__(self) -> None:
        self._bar = progress_bar("tune")
        self._start = time.monotonic()
        self._task = ""

    def __enter__(self) -> Live:
        self._report = self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def watched(self, address: str) -> None:
        """A page shows the studies now."""
        print(f"nsagen: tune: watch it at {address} until it ends", file=sys.stderr, flush=True)

    def step(self, step: Step) -> None:
        """A schedule was evaluated."""
        best = "nothing ran yet" if step.best_ms is None else f"best {step.best_ms:.4g}"
        what = f"{step.number}/{step.tasks} {step.task}: {best}"
        self._report(what, step.count, step.of)

    def decided(self, record: TuningRecord, device: str) -> None:
        """A record was decided."""
        if sys.stderr.isatty():
            return
        seconds = time.monotonic() - self._start
        print(
            f"[{seconds:6.1f} s] {record.workload}, {record.bucket}: {record.schedule}; "
            f"{record.evidence(device)}; {record.measured} of {record.of} tried, "
            f"{record.failed} failed; {record.ended}",
            file=sys.stderr,
            flush=True,
        )


def result_json(result: Result) -> dict[str, Any]:
    """A result for programs."""
    return {
        "device": result.device,
        "study": result.url,
        "files": [str(path) for path in result.files],
        "records": [
            {
                "op": record.workload.op,
                "pass": record.workload.pass_,
                "workload": record.workload.label,
                "bucket": str(record.bucket),
                "sizes": record.sizes,
                "objective": record.objective,
                "algorithm": record.schedule.algorithm,
                "knobs": dict(record.schedule.knobs),
                "ms": record.ms,
                "spread": record.spread,
                "default_ms": record.default.ms if record.default else None,
                "measured": record.measured,
                "failed": record.failed,
                "of": record.of,
                "ended": record.ended,
            }
            for record in result.records
        ],
        "failures": result.failures,
        "notes": result.notes,
    }


def print_result(result: Result) -> None:
    """A table of the records, then where everything is."""
    if result.records:
        static = result.records[0].objective == "static"
        unit = "cost" if static else "ms"
        print_table(
            f"best schedules on {result.device}",
            ["workload", "bucket", "schedule", unit, f"default {unit}", "gain", "tried"],
            [_row(record) for record in result.records],
            names=2,
            right=(unit, f"default {unit}", "gain", "tried"),
            broken=("schedule",),
        )
    for line in result.notes:
        print_line(line)
    for line in _failures(result.failures):
        print(f"nsagen: tune: {line}", file=sys.stderr)
    for path in result.files:
        print_line(f"wrote {path}")


SHOWN_FAILURES = 3
"""Tasks named for each reason; --json has all."""


def _failures(lines: Sequence[str]) -> Iterator[str]:
    """The lines of `Result.failures`, many of one reason as a count."""
    of_reason: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        of_reason[line.partition(": ")[2]].append(line)
    for reason, alike in of_reason.items():
        yield from alike[:SHOWN_FAILURES]
        if len(alike) > SHOWN_FAILURES:
            yield f"{len(alike) - SHOWN_FAILURES} more: {reason}"


def _row(record: TuningRecord) -> tuple[str, ...]:
    default, gain = "cannot run", ""
    if record.default is not None:
        default = f"{record.default.ms:.4g}"
        gain = f"{100 * (record.default.ms / record.ms - 1):+.1f}%"
        if record.default.schedule == record.schedule:
            gain = "default"
    tried = f"{record.measured}/{record.of}"
    return (
        str(record.workload),
        str(record.bucket),
        str(record.schedule),
        f"{record.ms:.4g}",
        default,
        gain,
        tried,
    )
