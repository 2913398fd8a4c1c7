"""The end of a search: its best schedules compared once more, and the record of the winner."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from nsagen import __version__
from nsagen.tune.evaluate import Evaluator, Final
from nsagen.tune.record import Objective, Timed, TuningRecord
from nsagen.tune.search import Search, fingerprint_or_none
from nsagen.tune.settings import Device
from nsagen.tune.task import Task
from nsagen.workload import Schedule

FINALISTS = 4
"""Schedules that are compared in turn with the default in the end."""

MARGIN = {"time": 0.01, "static": 0.25}
"""By how much another schedule must beat the default, which wins ties."""


def decide_search(
    search: Search, evaluator: Evaluator, device: Device, objective: Objective, ended: str
) -> TuningRecord | str:
    """The record of a search, or why there is none.

    Args:
        ended: why the search ended, as the record notes it.
    """
    task, measured = search.task, search.measured()
    failed = [m for m in measured if not m.outcome.ok]
    best = [m.schedule for m in search.best(FINALISTS)]
    if not best:
        reasons = sorted({m.outcome.reason for m in failed})
        return f"no schedule ran; {reasons[0] if reasons else 'none was tried'}"
    default = evaluator.candidates(task).default
    able = [] if default in {m.schedule for m in failed} else [default]
    finals = evaluator.finals(task, list(dict.fromkeys([*able, *best])))
    decided = _certified(evaluator, task, finals, default, MARGIN[objective])
    if isinstance(decided, str):
        return decided
    winner, running = decided
    beside = next((f for f in running if f.schedule == default), None)
    other = next((f for f in running if f != winner), None)
    return TuningRecord(
        workload=task.workload,
        bucket=task.bucket,
        objective=objective,
        sizes=task.sizes_text,
        schedule=winner.schedule,
        fingerprint=fingerprint_or_none(task, winner.schedule) or "",
        ms=_six_digits(winner.ms),
        spread=_six_digits(winner.spread),
        default=beside and Timed(default, _six_digits(beside.ms)),
        runner_up=other and Timed(other.schedule, _six_digits(other.ms)),
        measured=len(measured),
        failed=len(failed),
        of=len(search.coding),
        ended=ended,
        triton=device.triton,
        driver=device.driver,
        nsagen=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _certified(
    evaluator: Evaluator, task: Task, finals: Sequence[Final], default: Schedule, margin: float
) -> tuple[Final, list[Final]] | str:
    """The winner, which passed its last check, and all that ran, fastest first; or why not."""
    running = sorted((f for f in finals if not f.reason), key=lambda f: f.ms)
    reason = finals[0].reason
    while running:
        beside = next((f for f in running if f.schedule == default), None)
        winner = decide(running, beside, margin)
        reason = evaluator.certify(task, winner.schedule)
        if not reason:
            return winner, running
        running.remove(winner)
    return f"no finalist holds; {reason}"


def _six_digits(value: float) -> float:
    """What a record's file keeps of a number."""
    return float(f"{value:.6g}")


def decide(running: Sequence[Final], default: Final | None, margin: float) -> Final:
    """The winner of finalists, fastest first: the default, unless another is clearly faster.

    Clearly: by `margin` in the median, and in all rounds but one.
    """
    best = running[0]
    if default is None or best == default:
        return best
    rounds = list(zip(best.rounds, default.rounds, strict=True))
    lost = sum(ours >= theirs for ours, theirs in rounds)
    clear = best.ms <= default.ms * (1 - margin) and lost <= 1
    return best if clear else default
