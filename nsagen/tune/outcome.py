"""The result of evaluating one schedule: a time, or the reason why it has none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The result of one evaluation.

    Attributes:
        ms: median time (objective time) or cost (objective static); None if it failed.
        reason: why it failed; empty if it did not.
        spread: interquartile range of the timings over their median.
        repeats: medians of the first, middle and last third of the timings.
        error: largest relative error of an output at the checked sizes.
        compile_s: seconds spent on compiling, in a separate process.
        kernels: resources of each kernel, as `Resources` fields.
        fingerprint: of the kernel's source; see `kernel_fingerprint`.
        identity: equal for schedules with the same binaries and calls; see `identity_of`.
        twin: the schedule of the same identity that was measured instead of this one.
    """

    ms: float | None = None
    reason: str = ""
    spread: float = 0.0
    repeats: tuple[float, ...] = ()
    error: float = 0.0
    compile_s: float = 0.0
    kernels: tuple[Mapping[str, Any], ...] = field(default=())
    fingerprint: str = ""
    identity: str = ""
    twin: str = ""

    @property
    def ok(self) -> bool:
        return self.ms is not None

    def as_json(self) -> dict[str, Any]:
        """What a storage or a recording keeps."""
        return {**asdict(self), "kernels": [dict(kernel) for kernel in self.kernels]}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of `as_json`; ignores what another version of nsagen added.

        Raises:
            ValueError: not an outcome, or one that cannot be understood.
        """
        if not isinstance(values, Mapping) or "ms" not in values:
            raise ValueError(f"not an outcome: {str(values)[:60]}")
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        ms = known["ms"]
        if not (ms is None or (isinstance(ms, (int, float)) and math.isfinite(ms))):
            raise ValueError(f"not a time: {str(ms)[:60]}")
        for name in ("kernels", "repeats"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)

    @classmethod
    def of_trial(cls, attributes: Mapping[str, Any]) -> Outcome | None:
        """What a study keeps of an evaluation; None if this version cannot read it."""
        try:
            return cls.of_json(attributes["outcome"]) if "schedule" in attributes else None
        except (KeyError, TypeError, ValueError):
            return None


def unknown_keys(attributes: Mapping[str, Any]) -> set[str]:
    """What a trial says that this version does not know: another version wrote it, or a user."""
    outcome = attributes.get("outcome")
    of_outcome = outcome.keys() if isinstance(outcome, Mapping) else ()
    known = {one.name for one in fields(Outcome)}
    return (attributes.keys() - {"owner", "schedule", "outcome"}) | (set(of_outcome) - known)


class WrongOutputError(Exception):
    """A kernel's output differs from the reference."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of runs.

    Attributes:
        ms: their median.
        spread: their interquartile range over the median.
        repeats: medians of the first, middle and last third.
        error: the largest relative error of an output.
    """

    ms: float
    spread: float
    repeats: tuple[float, ...]
    error: float = 0.0

    @classmethod
    def of(cls, samples: Sequence[float], error: float = 0.0) -> Timing:
        ordered, third = sorted(samples), -(-len(samples) // 3)
        low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
        middle = statistics.median(ordered)
        thirds = (samples[start : start + third] for start in range(0, len(samples), third))
        return cls(middle, (high - low) / middle, tuple(map(statistics.median, thirds)), error)
