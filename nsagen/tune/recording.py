"""Recordings: measures every schedule of a task once, so that searches can be replayed.

A recording is gzipped JSON lines: one says what was measured and where, one per schedule gives
its outcome (failures and compile time included), and the last holds the ten best, timed in turn.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
import os
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from nsagen.cases.sizes import Sizes
from nsagen.core.bucket import Bucket
from nsagen.core.errors import NsagenError, TuneError
from nsagen.core.files import check_replaceable, check_writable, locked, replace_file
from nsagen.core.text import shown_keys
from nsagen.core.workload import Schedule, Workload
from nsagen.tune.evaluate import Candidates, Evaluator
from nsagen.tune.outcome import Outcome, unknown_keys
from nsagen.tune.task import Task, fingerprint_or_none

FORMAT = 1
REFINED = 10

_SIZES = ("bucket", "timed", "checked")
_HEAD_KEYS = {"format", "synthetic", "workload", *_SIZES, "default", "others", "facts"}
_HEAD_KEYS |= {"version"}  # of old recordings
_ROW_KEYS = {"algorithm", "knobs"}

_log = logging.getLogger("nsagen.tune")

_LONGEST_LINE = 1 << 20

_DAMAGES = (
    *(OSError, EOFError, zlib.error, ValueError, RecursionError),
    *(KeyError, TypeError, AttributeError, NsagenError),
)
"""What reading a file that is no recording, or a damaged one, may raise."""


@dataclass(frozen=True)
class Recording:
    """A task's outcomes by schedule.

    Attributes:
        synthetic: made by a formula, not a GPU: it may test a search but supports no claim.
        facts: about the device and software, or about the formula if synthetic.
        refined: milliseconds of the best schedules, timed in turn: they define the optimum.
        others: the defaults of the other algorithms.
    """

    task: Task
    default: Schedule
    synthetic: bool
    facts: Mapping[str, Any]
    outcomes: Mapping[Schedule, Outcome]
    refined: Mapping[Schedule, float]
    others: tuple[Schedule, ...] = ()

    def true_ms(self, schedule: Schedule) -> float:
        """The best estimate of a schedule's time; infinite if it fails.

        Only the best schedules were timed in turn. The others were slower than those when all were
        timed once, so a lucky single time does not make one of them faster than the optimum.
        """
        if schedule in self.refined:
            return self.refined[schedule]
        ms = self.outcomes[schedule].ms
        if ms is None:
            return float("inf")
        return max(ms, self.optimum_ms) if self.refined else ms

    @property
    def optimum_ms(self) -> float:
        """The least time of the best schedules, timed in turn; without those, of all."""
        if self.refined:
            return min(self.refined.values())
        return min(self.true_ms(schedule) for schedule in self.outcomes)


def record(
    task: Task,
    evaluator: Evaluator,
    path: Path,
    *,
    facts: Mapping[str, Any],
    ahead: int,
    seconds: float | None = None,
    on_step: Callable[[int, int, Schedule, Outcome], None] = lambda *_: None,
    synthetic: bool = False,
) -> int:
    """Measure every schedule of a task, in random order, into `path` (*.jsonl.gz).

    Lines go to `path` without .gz as they come, so a crash loses one schedule. Running it again
    continues from there, and from a finished recording: no outcome is lost or measured twice.

    Args:
        seconds: stop after this long; what was measured until then is still a recording.

    Returns:
        how many schedules have an outcome.

    Raises:
        TuneError: `path`, or the file of its lines, exists and is not a recording of the task, or
            is a finished one of another device or of kernels that have changed since.
    """
    candidates = evaluator.candidates(task)
    with locked(path.parent, path.name):  # the lines of two processes would mix
        check_free(path, task)
        plain = _plain(path)
        known = _resume(path, task, facts)
        order = [s for s in candidates.schedules if s != candidates.default]
        random.Random(0).shuffle(order)
        rest = [s for s in (candidates.default, *order) if s not in known]
        end = None if seconds is None else time.monotonic() + seconds
        with plain.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                header = _header(task, candidates, facts, synthetic)
                _write_line(file, header)
            for schedule, outcome in _evaluated(task, evaluator, rest, ahead, end):
                known[schedule] = outcome
                _write_line(file, {**_schedule_json(schedule), **outcome.as_json()})
                on_step(len(known), len(candidates.schedules), schedule, outcome)
            good = sorted((o.ms, s) for s, o in known.items() if o.ms is not None)
            finals = evaluator.finals(task, [s for _, s in good[:REFINED]]) if good else []
            rows = [{**_schedule_json(f.schedule), "ms": f.ms} for f in finals if not f.reason]
            _write_line(file, {"refined": rows})
        if plain != path:
            replace_file(path, gzip.compress(plain.read_bytes(), mtime=0))
            plain.unlink()
        return len(known)


def _evaluated(
    task: Task,
    evaluator: Evaluator,
    schedules: Sequence[Schedule],
    ahead: int,
    end: float | None,
) -> Any:
    """(schedule, outcome) pairs, while later schedules compile; stops at `end`."""
    waiting, pending = deque(schedules), deque[Schedule]()
    best_ms: float | None = None
    while (waiting or pending) and (end is None or time.monotonic() < end):
        while waiting and len(pending) < 4 * ahead:
            pending.append(waiting.popleft())
            evaluator.start(task, pending[-1])
        ready = next((s for s in pending if evaluator.ready(task, s)), pending[0])
        pending.remove(ready)
        outcome = evaluator.finish(task, ready, best_ms)  # a much slower one is timed roughly
        best_ms = min(outcome.ms or math.inf, best_ms or math.inf)
        yield ready, outcome


def load_recording(path: Path) -> Recording:
    """Read a recording.

    Raises:
        TuneError: the file is missing, or is not a recording of this format.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        lines = [json.loads(line) for line in text.splitlines()]
        head, *rows = lines
        if head.get("format") != FORMAT:
            raise ValueError(f"its format is {head.get('format')!r}, not {FORMAT}")
        refined = rows.pop()["refined"] if rows and "refined" in rows[-1] else []
        _say_unknown(path, head, rows)
        return Recording(
            task=_task_of(head),
            default=_schedule_of(head["default"]),
            synthetic=head["synthetic"],
            facts=head["facts"],
            outcomes={_schedule_of(row): _outcome_of(row) for row in rows},
            refined={_schedule_of(row): row["ms"] for row in refined},
            others=tuple(map(_schedule_of, head.get("others", ()))),
        )
    except _DAMAGES as e:
        said = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise TuneError(
            f"{path}: must be a recording that nsagen tune --record-exhaustive wrote; {said}"
        ) from None


def _say_unknown(path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Log what another version wrote and this one does not use."""
    of_rows = {key for row in rows for key in row} - _ROW_KEYS
    unknown = (head.keys() - _HEAD_KEYS) | unknown_keys({"outcome": dict.fromkeys(of_rows)})
    if unknown:
        _log.warning(
            "%s: says %s, which is not understood here; it is not used", path, shown_keys(unknown)
        )


def check_free(path: Path, task: Task) -> None:
    """Refuse to record into a file that is not a recording of the task, finished or not.

    Raises:
        TuneError: names the file, at `path` or at the file of its lines.
        OSError: the folder cannot be written.
    """
    check_writable(path.parent)
    for file in {path, _plain(path)}:
        if os.path.lexists(file):
            _check_of(file, task)
            check_replaceable(file)


def _check_of(path: Path, task: Task) -> None:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            head = file.readline(_LONGEST_LINE)
        if not head and path.suffix != ".gz":
            return  # an empty file: the process was killed as it started
        row = json.loads(head)
        if row.get("format") != FORMAT:
            raise ValueError("it has no header of one")
        came = _task_of(row)
    except _DAMAGES as e:
        said = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise TuneError(
            f"{path}: must be free, or a recording to go on with; got another file ({said}); "
            "move it away, or name another"
        ) from None
    if came != task:
        raise _other_recording(path, f"of {task}", f"one of {came}")


def _plain(path: Path) -> Path:
    """Where the lines go during recording."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def _resume(path: Path, task: Task, facts: Mapping[str, Any]) -> dict[Schedule, Outcome]:
    """What is measured already; puts it into the file of lines, without a torn last one.

    Outcomes of changed kernels are dropped from an unfinished recording.

    Raises:
        TuneError: a finished recording would lose outcomes.
    """
    plain = _plain(path)
    finished: list[dict[str, Any]] = []
    if path != plain and path.is_file():
        load_recording(path)  # refuses a damaged one
        finished = _rows_of(gzip.decompress(path.read_bytes()))
    unfinished = _rows_of(plain.read_bytes()) if plain.is_file() else []
    rows: dict[Schedule, dict[str, Any]] = {}
    lost = 0
    for row in (*finished[1:], *unfinished[1:]):
        with contextlib.suppress(KeyError, TypeError, ValueError, NsagenError):
            schedule, outcome = _schedule_of(row), _outcome_of(row)
            if (outcome.fingerprint or None) == fingerprint_or_none(task, schedule):
                rows[schedule] = row
            else:
                lost += 1
    is_complete = bool(finished) or any("refined" in row for row in unfinished)
    head = (finished or unfinished)[:1]
    here = facts.get("device")
    device = head[0]["facts"].get("device", here) if head else here
    if device != here:
        raise _other_recording(path, f"of this device, {here}", f"one of {device}")
    if is_complete and lost:
        raise _other_recording(
            path, "of the present kernels", f"{lost} outcomes of kernels that have changed"
        )
    if head:
        lines = (json.dumps(row) + "\n" for row in (*head, *rows.values()))
        replace_file(plain, "".join(lines))
    return {schedule: _outcome_of(row) for schedule, row in rows.items()}


def _other_recording(path: Path, wanted: str, came: str) -> TuneError:
    return TuneError(
        f"{path}: must be free, or a recording {wanted}; got {came}; nothing was changed; "
        "move it away, or name another"
    )


def _rows_of(data: bytes) -> list[dict[str, Any]]:
    """A recording's rows without torn lines."""
    lines = data.decode("utf-8", "replace").splitlines(keepends=True)
    return [row for row in map(_row_of, lines) if row is not None]


def _row_of(line: str) -> dict[str, Any] | None:
    """A line's row; None for a torn line."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _write_line(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _header(
    task: Task, candidates: Candidates, facts: Mapping[str, Any], synthetic: bool
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "synthetic": synthetic,
        "workload": asdict(task.workload),
        "bucket": asdict(task.bucket),
        "timed": asdict(task.timed),
        "checked": asdict(task.checked),
        "default": _schedule_json(candidates.default),
        "others": [_schedule_json(schedule) for schedule in candidates.others],
        "facts": dict(facts),
    }


def _task_of(head: Mapping[str, Any]) -> Task:
    workload, bucket = head["workload"], head["bucket"]
    pairs = {**workload, "params": tuple((name, value) for name, value in workload["params"])}
    timed, checked = (
        Sizes(**{**head[key], "seqlens": tuple(head[key]["seqlens"])})
        for key in ("timed", "checked")
    )
    limits = Bucket(tuple(bucket["tokens"]), tuple(bucket["context"]))
    return Task(Workload(**pairs), limits, timed, checked)


def _schedule_json(schedule: Schedule) -> dict[str, Any]:
    return {"algorithm": schedule.algorithm, "knobs": dict(schedule.knobs)}


def _schedule_of(row: Mapping[str, Any]) -> Schedule:
    return Schedule.of(row["algorithm"], row["knobs"])


def _outcome_of(row: Mapping[str, Any]) -> Outcome:
    return Outcome.of_json({k: v for k, v in row.items() if k not in ("algorithm", "knobs")})
