"""What runs of several forms of attention, lengths and seeds came to, as a table and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, whatever display there is

import matplotlib.pyplot as plt

from .retrieval import KINDS

FORMS = ("nsa", "dense", "infllm_v2", "msa")
COLORS: dict[str, str] = dict(
    zip(FORMS, ("tab:blue", "tab:orange", "tab:green", "tab:purple"), strict=True)
)
LENGTHS = (4096, 16384, 65536)
SEEDS = (0, 1, 2)

Row = dict[str, Any]
"""What a run came to: form, length, seed, loss, and the accuracy of each kind of question."""


@dataclass(frozen=True)
class Measure:
    """A number of a row.

    Attributes:
        of: the number.
        digits: shown after the point.
    """

    of: Callable[[Row], float]
    digits: int = 1


def _accuracy(kind: str) -> Measure:
    return Measure(lambda row: 100 * row["accuracy"][kind])


MEASURES: dict[str, dict[str, Measure]] = {
    "retrieval": {f"{kind}, %": _accuracy(kind) for kind in KINDS},
    "text": {
        "loss, nats a byte": Measure(lambda row: row["loss"], 4),
        "next byte right, %": _accuracy("next byte"),
    },
}
"""Of each task, by name and unit."""


def spread_of(
    rows: Sequence[Row], form: str, length: int, measure: Measure
) -> tuple[float, float, int]:
    """Mean and standard deviation over the seeds, and their number."""
    found = [measure.of(r) for r in rows if (r["form"], r["length"]) == (form, length)]
    deviation = stdev(found) if len(found) > 1 else 0.0
    return (mean(found) if found else 0.0), deviation, len(found)


def table(
    rows: Sequence[Row],
    forms: Sequence[str],
    lengths: Sequence[int],
    measures: Mapping[str, Measure],
) -> str:
    """Markdown: a line for each measure and length, mean, spread and seeds for each form."""
    head = ["", "tokens", *forms]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, measure in measures.items():
        for length in lengths:
            cells = [name, str(length)]
            for form in forms:
                middle, deviation, seeds = spread_of(rows, form, length, measure)
                spread = f" ± {deviation:.{measure.digits}f}" if seeds > 1 else ""  # one has none
                text = f"{middle:.{measure.digits}f}{spread} ({seeds})"
                cells.append(text if seeds else "not measured yet")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(
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
                look = {"color": COLORS[form], "capsize": 4, "label": form}
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
