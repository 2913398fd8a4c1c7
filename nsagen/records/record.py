"""A tuning record: the best known schedule of a workload and bucket, with its evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nsagen.core.bucket import Bucket
from nsagen.core.workload import Schedule, Workload

Objective = Literal["time", "static"]


@dataclass(frozen=True)
class Timed:
    """A schedule and its time in milliseconds (objective time) or cost (objective static)."""

    schedule: Schedule
    ms: float


@dataclass(frozen=True)
class TuningRecord:
    """The best known schedule of a workload and bucket on a device.

    Attributes:
        objective: "time": measured; "static": ranked by compile-time resources, never run.
        sizes: the timed sizes, as text.
        fingerprint: of the winner's kernel; see `kernel_fingerprint`.
        ms: time in milliseconds, or cost without a unit.
        spread: (slowest - fastest round) / median of the winner, in the final comparison.
        default: the architecture's default, timed beside the winner; None if it cannot run.
        runner_up: the best schedule except the winner, if any. It may be faster: the default wins
            unless another is clearly faster, by 1% (time) or 25% (static).
        measured, failed, of: evaluations, how many gave no time, and how many schedules are valid.
        ended: why the search ended, and why a slower winner beat its runner-up.
        date: when, in UTC, as YYYY-MM-DDTHH:MM:SSZ.
    """

    workload: Workload
    bucket: Bucket
    objective: Objective
    sizes: str
    schedule: Schedule
    fingerprint: str
    ms: float
    spread: float
    default: Timed | None
    runner_up: Timed | None
    measured: int
    failed: int
    of: int
    ended: str
    triton: str
    driver: str
    nsagen: str
    date: str

    @property
    def key(self) -> tuple[Workload, Bucket, Objective, str]:
        """The key under which a file has one record.

        Sizes are part of it: runs of one size each have the same bucket, all calls, and a later run
        must not discard what an earlier one measured.
        """
        return (self.workload, self.bucket, self.objective, self.sizes)

    def evidence(self, device: str) -> str:
        """Where and how fast, on one line, as generated files show it."""
        if self.objective == "static":
            return f"ranked by compile-time resources for {device.removeprefix('static-')}; not run"
        beside = "the default cannot run"
        if self.default is not None:
            beside = f"default {self.default.ms:.4g} ms"
        if self.default is not None and self.default.schedule == self.schedule:
            beside = "the default, confirmed"
        return f"tuned on {device}: {self.ms:.4g} ms at {self.sizes}; {beside}"
