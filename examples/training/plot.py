"""Figures of runs: losses and validations of one task; of a model that is continued as NSA; what
forms reach at several lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, whatever display there is

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .loop import History
from .rows import FORMS, HARDER, Measure, Row, longer, spread_of

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


def plot_continued(
    path: Path, losses: Sequence[float], measured: Sequence[Mapping[str, float]], border: int
) -> None:
    """Write a PNG with the losses of both stages, the dense model's as a line, and the distance.

    Args:
        losses: of each step.
        measured: step, loss, dense_loss and distance, before, between and after the stages.
        border: steps of the first stage.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps, at = range(1, len(losses) + 1), [one["step"] for one in measured]
    left.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.7)
    left.plot(steps, smoothed(losses), color="tab:blue", label="NSA, training")
    validation = [one["loss"] for one in measured]
    left.plot(at, validation, "o--", color="tab:blue", label="NSA, validation")
    dense = measured[0]["dense_loss"]
    left.axhline(dense, color="tab:orange", label="the dense model, validation")
    left.set(title="new parameters, then all", xlabel="step", ylabel="cross entropy (nats)")
    right.plot(at, [one["distance"] for one in measured], "o-", color="tab:blue")
    right.set(title="logits, relative to the dense model's", xlabel="step", ylabel="distance")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.axvline(border, color="gray", linewidth=0.7)
        axes.grid(alpha=0.3)
    left.legend()
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
    columns = min(len(measures), 3)
    lines = -(-len(measures) // columns)
    size = (3.2 * columns, 3 * lines + 0.3)
    figure, all_axes = plt.subplots(lines, columns, figsize=size, layout="constrained")
    for axes, (name, measure) in zip(all_axes.flat, measures.items(), strict=False):
        for form in forms:
            found = [(n, *spread_of(rows, form, n, measure)) for n in sorted(lengths)]
            _line(axes, form, [one for one in found if one[-1]])
        _by_length(axes, name, lengths, percent=name.endswith("%"))
    for axes in all_axes.flat[len(measures) :]:
        axes.remove()
    all_axes.flat[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_longer(
    path: Path, rows: Sequence[Row], forms: Sequence[str], lengths: Sequence[int]
) -> None:
    """Write a PNG with a panel for each length trained to: the mean over kinds by length asked."""
    size = (3.2 * len(lengths), 3.3)
    figure, all_axes = plt.subplots(
        1, len(lengths), figsize=size, layout="constrained", squeeze=False
    )
    for axes, trained in zip(all_axes.flat, lengths, strict=True):
        for form in forms:
            names = {n: "as trained, %" if n == trained else f"{longer(n)}, %" for n in lengths}
            asked = [n for n in lengths if n >= trained]
            found = [(n, *spread_of(rows, form, trained, HARDER[names[n]])) for n in asked]
            _line(axes, form, [one for one in found if one[-1]])
        _by_length(axes, f"trained to {trained} tokens, %", lengths, percent=True)
    all_axes.flat[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axes: Axes, form: str, found: Sequence[tuple[int, float, float, int]]) -> None:
    """Means with their deviations by length."""
    if found:
        at, middle, deviation, _ = zip(*found, strict=True)
        look = {"color": FORM_COLORS[form], "capsize": 4, "label": form}
        axes.errorbar(at, middle, deviation, fmt="o-", **look)


def _by_length(axes: Axes, title: str, lengths: Sequence[int], percent: bool) -> None:
    axes.set(title=title, xlabel="tokens", xscale="log")
    axes.set_xlim(min(lengths) / 1.5, max(lengths) * 1.5)
    axes.set_xticks(sorted(lengths), [str(n) for n in sorted(lengths)])
    if percent:
        axes.set_ylim(0, 105)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
