"""What a measurement says: times, or that a kernel computed something else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


class WrongOutputError(Exception):
    """A kernel computed something else than the reference."""


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
