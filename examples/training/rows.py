"""What runs of several forms of attention, lengths and seeds came to, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from .retrieval import KINDS

FORMS = ("nsa", "dense", "infllm_v2", "msa")
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
