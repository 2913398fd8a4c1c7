"""A Gaussian process over the list of all schedules, and the most promising schedule.

General samplers search the parameter space for the largest expected improvement. Here every
schedule is known, so the expectation is computed for each one: exact, and faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

Array = NDArray[np.float64]

CLIP = np.log(4.0)
"""Values this far above the best are treated alike: they need no precise model."""

_SQRT5 = 5.0**0.5
_LEAST_NOISE = 1e-5


def propose(
    points: Array,
    told: NDArray[np.intp],
    values: Array,
    pending: NDArray[np.intp],
    free: NDArray[np.intp],
    seed: int,
) -> int:
    """The free point with the largest expected improvement.

    Args:
        points: [n, d], each coordinate within 0..1.
        told: indices of measured points, and `values`: their logarithmic times.
        pending: indices of points that are being measured; they count as their prediction.
        free: indices to choose from; not empty.
        seed: draws among equals.
    """
    clipped = np.minimum(values, values.min() + CLIP)
    process = Process.fit(points[told], clipped)
    if len(pending):
        process = process.extended(points[pending], process.predict(points[pending])[0])
    mean, deviation = process.predict(points[free])
    best = process.predict(process.x)[0].min()
    gain = (best - mean) / deviation
    density = np.exp(-0.5 * gain**2) / np.sqrt(2 * np.pi)
    improvement = deviation * (gain * ndtr(gain) + density)
    order = np.random.default_rng(seed).permutation(len(free))
    return int(free[order[np.argmax(improvement[order])]])


@dataclass(frozen=True)
class Process:
    """A Gaussian process with a Matern-5/2 kernel, one length a dimension, and noise.

    Attributes:
        x, y: the data; y less `level`.
        lengths, noise: of the kernel, noise as a share of `variance`.
    """

    x: Array
    y: Array
    level: float
    lengths: Array
    noise: float
    variance: float
    factor: tuple[Array, bool]

    @classmethod
    def fit(cls, x: Array, values: Array) -> Process:
        """The most probable process given data, under mild priors of its parameters."""
        level = float(values.mean())
        y = values - level
        squares = (x[:, None, :] - x[None, :, :]) ** 2
        start = np.concatenate([np.full(x.shape[1], np.log(0.7)), [np.log(1e-2)]])
        bounds = [(np.log(0.05), np.log(20.0))] * x.shape[1] + [(np.log(_LEAST_NOISE), 0.0)]
        found = minimize(
            _loss,
            start,
            (squares, y),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 30},
        )
        lengths, noise = np.exp(found.x[:-1]), float(np.exp(found.x[-1]))
        return cls._of(x, y, level, lengths, noise, None)

    @classmethod
    def _of(
        cls, x: Array, y: Array, level: float, lengths: Array, noise: float, variance: float | None
    ) -> Process:
        gram = _kernel(x, x, lengths) + noise * np.eye(len(x))
        factor = cho_factor(gram, lower=True)
        if variance is None:
            variance = max(float(y @ cho_solve(factor, y)) / len(y), 1e-12)
        return cls(x, y, level, lengths, noise, variance, factor)

    def extended(self, x: Array, values: Array) -> Process:
        """The process with more data and the same parameters."""
        y = np.concatenate([self.y, values - self.level])
        return self._of(
            np.concatenate([self.x, x]), y, self.level, self.lengths, self.noise, self.variance
        )

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, noise not included, at points."""
        cross = _kernel(x, self.x, self.lengths)
        mean = self.level + cross @ cho_solve(self.factor, self.y)
        half = solve_triangular(self.factor[0], cross.T, lower=True)
        share = np.maximum(1.0 - (half**2).sum(0), 1e-9)
        return mean, np.sqrt(self.variance * share)


def _kernel(a: Array, b: Array, lengths: Array) -> Array:
    left, right = a / lengths, b / lengths
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None, :] - 2 * left @ right.T
    distance = _SQRT5 * np.sqrt(np.maximum(squares, 0.0))
    return (1 + distance + distance**2 / 3) * np.exp(-distance)


def _loss(parameters: Array, squares: Array, y: Array) -> tuple[float, Array]:
    """Negative logarithmic posterior of lengths and noise, the variance profiled out."""
    lengths, noise = np.exp(parameters[:-1]), np.exp(parameters[-1])
    scaled = squares / lengths**2
    distance = _SQRT5 * np.sqrt(scaled.sum(-1))
    decay = np.exp(-distance)
    gram = (1 + distance + distance**2 / 3) * decay + noise * np.eye(len(y))
    factor = cho_factor(gram, lower=True)
    inverse = cho_solve(factor, np.eye(len(y)))
    weights = inverse @ y
    variance = max(float(y @ weights) / len(y), 1e-12)
    loss = 0.5 * len(y) * np.log(variance) + np.log(np.diag(factor[0])).sum()
    pull = inverse - np.outer(weights, weights) / variance
    slope = (5 / 3) * ((1 + distance) * decay)[:, :, None] * scaled
    gradient = np.concatenate(
        [0.5 * np.einsum("ij,ijk->k", pull, slope), [0.5 * noise * np.trace(pull)]]
    )
    # Priors: lengths about the range of a knob, noise about a percent of the variance.
    apart = np.concatenate([(parameters[:-1] - np.log(0.7)), [(parameters[-1] - np.log(1e-2)) / 2]])
    width = np.concatenate([np.ones(len(lengths)), [2.0]])
    return loss + 0.5 * float((apart**2).sum()), gradient + apart / width
