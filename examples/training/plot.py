"""Figures of runs: losses and validations of one task; what forms reach at several lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, whatever display there is

import matplotlib.pyplot as plt

from .loop import History
from .rows import FORMS, Measure, Row, spread_of

STYLES = {"dense": ("tab:orange", 3.0), "nsa": ("tab:blue", 1.2)}
"""Color and width, in the order of drawing: where curves are one, the narrow one is on the wide."""

FORM_COLORS: dict[str, str] = dict(
    zip(FORMS, ("tab:blue", "tab:orange", "tab:green", "tab:purple"), strict=True)
)


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


def plot_rows(
    path: Path,
    rows: Sequence[Row],
    forms: Sequence[str],
    lengths: Sequence[int],
    measures: Mapping[str, Measure],
) -> None:
    """Write a PNG with each measure by length, a line and its spread for each form."""
    size = (3 * len(measures), 3.6)
    figure, all_axes = plt.subplots(1, len(measures), figsize=size, layout="constrained")
    for axes, (name, measure) in zip(all_axes, measures.items(), strict=True):
        for form in forms:
            found = [(n, *spread_of(rows, form, n, measure)) for n in sorted(lengths)]
            measured = [(n, middle, deviation) for n, middle, deviation, seeds in found if seeds]
            if measured:
                at, middle, deviation = zip(*measured, strict=True)
                look = {"color": FORM_COLORS[form], "capsize": 4, "label": form}
                axes.errorbar(at, middle, deviation, fmt="o-", **look)
        axes.set(title=name, xlabel="tokens", xscale="log")
        axes.set_xticks(sorted(lengths), [str(n) for n in sorted(lengths)])
        if name.endswith("%"):
            axes.set_ylim(0, 105)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    all_axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
