"""The end of a search: compares its best schedules once more and records the winner."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from nsagen.core.version import __version__
from nsagen.core.workload import Schedule
from nsagen.records.record import Objective, Timed, TuningRecord
from nsagen.tune.evaluate import Evaluator, Final
from nsagen.tune.search import Measured, Search
from nsagen.tune.settings import Device
from nsagen.tune.task import fingerprint_or_none

FINALISTS = 4
"""Schedules that are compared with the default at the end."""

NEAR = 1.1
"""Finalists are within this factor of the best: noise cannot make a winner of the others."""

MARGIN = {"time": 0.01, "static": 0.25}
"""By how much another schedule must beat the default; the default wins ties."""

_BETTER = {"time": "faster", "static": "cheaper"}


class FinalRound:
    """A search's end, step by step: `compare`, then `certify` until there is a result.

    `certify` needs the winner compiled once more. That starts as soon as the winner is known; until
    it is `ready`, the device can serve another search.

    Args:
        ended: why the search ended, as the record notes it.
    """

    def __init__(
        self, search: Search, evaluator: Evaluator, device: Device, objective: Objective, ended: str
    ) -> None:
        self._search, self._evaluator = search, evaluator
        self._device, self._ended = device, ended
        self._objective: Objective = objective
        self._default = evaluator.candidates(search.task).default
        self._running: list[Final] = []
        self._winner: Final | None = None
        self.result: TuningRecord | str | None = None

    @property
    def ready(self) -> bool:
        """Whether the next step need not wait."""
        if self._winner is None:
            return True
        return self._evaluator.last_ready(self._search.task, self._winner.schedule)

    def step(self) -> None:
        """Take the next step, which uses the device."""
        if self._winner is None:
            self._compare()
        else:
            self._certify(self._winner)

    def _compare(self) -> None:
        """Time the best schedules in turn with the default."""
        measured = self._search.measured()
        if not measured:
            self.result = (
                f"no schedule was tried; {self._ended}; the same command goes on from here"
            )
            return
        able = self._search.best(len(measured))
        near = [m for m in able if (m.outcome.ms or 0.0) <= NEAR * (able[0].outcome.ms or 0.0)]
        best = _apart(near)[:FINALISTS]
        if not best:
            reasons = sorted({m.outcome.reason for m in measured if not m.outcome.ok})
            self.result = f"no schedule ran; {reasons[0]}"
            return
        failed = {m.schedule for m in measured if not m.outcome.ok}
        first = [] if self._default in failed else [self._default]
        finals = self._evaluator.finals(self._search.task, list(dict.fromkeys([*first, *best])))
        self._running = sorted((f for f in finals if not f.reason), key=lambda f: f.ms)
        self._choose(finals[0].reason)

    def _choose(self, reason: str) -> None:
        """Pick the winner of those that still run; `reason` says why the others do not."""
        if not self._running:
            self.result = f"no finalist holds; {reason}"
            return
        self._winner = decide(self._running, self._beside, MARGIN[self._objective])
        self._evaluator.start_last(self._search.task, self._winner.schedule)

    @property
    def _beside(self) -> Final | None:
        return next((f for f in self._running if f.schedule == self._default), None)

    def _certify(self, winner: Final) -> None:
        reason = self._evaluator.certify(self._search.task, winner.schedule)
        if reason:
            self._running.remove(winner)
            self._choose(reason)
        else:
            self.result = self._record(winner)

    def _record(self, winner: Final) -> TuningRecord:
        task, measured, beside = self._search.task, self._search.measured(), self._beside
        other = next((f for f in self._running if f != winner), None)
        ended = self._ended
        if other and other.ms < winner.ms:  # it wins ties only
            ended += (
                f"; the default stays, as the runner-up is not clearly {_BETTER[self._objective]}"
            )
        return TuningRecord(
            workload=task.workload,
            bucket=task.bucket,
            objective=self._objective,
            sizes=task.sizes_text,
            schedule=winner.schedule,
            fingerprint=fingerprint_or_none(task, winner.schedule) or "",
            ms=_six_digits(winner.ms),
            spread=_six_digits(winner.spread),
            default=beside and Timed(self._default, _six_digits(beside.ms)),
            runner_up=other and Timed(other.schedule, _six_digits(other.ms)),
            measured=len(measured),
            failed=sum(not m.outcome.ok for m in measured),
            of=len(self._search.encoding),
            ended=ended,
            triton=self._device.triton,
            driver=self._device.driver,
            nsagen=__version__,
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )


def _apart(best: Sequence[Measured]) -> list[Schedule]:
    """Schedules in the same order, with only the first of those that are identical."""
    found: dict[str, Schedule] = {}
    for one in best:
        found.setdefault(one.outcome.identity or str(one.schedule), one.schedule)
    return list(found.values())


def _six_digits(value: float) -> float:
    """A number as a record's file keeps it."""
    return float(f"{value:.6g}")


def decide(running: Sequence[Final], default: Final | None, margin: float) -> Final:
    """The winner of finalists, fastest first: the default, unless another is clearly faster.

    Clearly faster: by `margin` in the median, and in all rounds but one.
    """
    best = running[0]
    if default is None or best == default:
        return best
    rounds = list(zip(best.rounds, default.rounds, strict=True))
    lost = sum(ours >= theirs for ours, theirs in rounds)
    clear = best.ms <= default.ms * (1 - margin) and lost <= 1
    return best if clear else default
