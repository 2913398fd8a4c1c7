"""A figure of the runs of one task: losses of all steps, and validations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, whatever display there is

import matplotlib.pyplot as plt

from .loop import History

STYLES = {"dense": ("tab:orange", 3.0), "nsa": ("tab:blue", 1.2)}
"""Color and width, in the order of drawing: where curves are one, the narrow one is on the wide."""


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    total, norm, result = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + 1 - weight
        result.append(total / norm)
    return result


def plot_runs(path: Path, title: str, runs: Mapping[str, History]) -> None:
    """Write a PNG with the losses of each run above, and the accuracies beside them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, (color, width) in STYLES.items():
        if name not in runs:
            continue
        history = runs[name]
        line = {"color": color, "linewidth": width}
        dots = {**line, "markersize": 3 + width}
        steps = range(1, len(history.losses) + 1)
        at = [one.step for one in history.validations]
        left.plot(steps, history.losses, color=color, alpha=0.2, linewidth=0.7)
        left.plot(steps, smoothed(history.losses), label=f"{name}, training", **line)
        validation = [one.loss for one in history.validations]
        left.plot(at, validation, "o--", label=f"{name}, validation", **dots)
        accuracy = [one.accuracy for one in history.validations]
        right.plot(at, accuracy, "o-", label=name, **dots)
    left.set(title=title, xlabel="step", ylabel="cross entropy (nats)")
    right.set(title="validation", xlabel="step", ylabel="accuracy", ylim=(0, 1.03))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
