"""What runs of several forms of attention, lengths and seeds came to, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from .retrieval import CROWD, KINDS

FORMS = ("nsa", "dense", "infllm_v2", "msa")
LENGTHS = (4096, 16384, 65536)
SEEDS = (0, 1, 2)

MISSING = "not run"

Row = dict[str, Any]
"""What a run came to: form, length, seed, loss, the accuracy of each kind of question, and that of
harder ones by what makes them harder."""


@dataclass(frozen=True)
class Measure:
    """A number of a row.

    Attributes:
        of: the number; None where a form has none.
        digits: shown after the point.
    """

    of: Callable[[Row], float | None]
    digits: int = 1


def _accuracy(kind: str) -> Measure:
    return Measure(lambda row: _percent(row["accuracy"], [kind]))


def _percent(found: Mapping[str, float], kinds: Sequence[str]) -> float | None:
    """The mean over kinds; None if one is not there."""
    return 100 * mean(found[kind] for kind in kinds) if {*kinds} <= found.keys() else None


def _harder(name: str) -> Measure:
    def of(row: Row) -> float | None:
        found = row.get("harder", {}).get(name, {})
        return _percent(found, [CROWD] if name == CROWD else list(KINDS))

    return Measure(of)


def fewer(blocks: int) -> str:
    """The name of a test with lists of so many blocks."""
    return f"topk {blocks}"


def longer(tokens: int) -> str:
    """The name of a test with so long sequences."""
    return f"{tokens} tokens"


MEASURES: dict[str, dict[str, Measure]] = {
    "retrieval": {f"{kind}, %": _accuracy(kind) for kind in KINDS},
    "text": {
        "loss, nats a byte": Measure(lambda row: row["loss"], 4),
        "next byte right, %": _accuracy("next byte"),
    },
}
"""Of each task, by name and unit."""

HARDER = {
    "as trained, %": Measure(lambda row: _percent(row["accuracy"], list(KINDS))),
    **{f"{longer(n)}, %": _harder(longer(n)) for n in LENGTHS[1:]},
    **{f"{fewer(n)}, %": _harder(fewer(n)) for n in (8, 4)},
    f"{CROWD}, %": _harder(CROWD),
}
"""Of retrieval: the mean over kinds where a model is asked for more than it was trained for."""


def spread_of(
    rows: Sequence[Row], form: str, length: int, measure: Measure
) -> tuple[float, float, int]:
    """Mean and standard deviation over the seeds, and their number."""
    there = (measure.of(r) for r in rows if (r["form"], r["length"]) == (form, length))
    found = [value for value in there if value is not None]
    deviation = stdev(found) if len(found) > 1 else 0.0
    return (mean(found) if found else 0.0), deviation, len(found)


def table(
    rows: Sequence[Row],
    forms: Sequence[str],
    lengths: Sequence[int],
    measures: Mapping[str, Measure],
) -> str:
    """Markdown: a line for each measure and length, mean, spread and seeds for each form.

    A dash where a form was measured and has no such number; no line where that is all there is.
    """
    head = ["", "tokens", *forms]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    there = {(row["form"], row["length"]) for row in rows}
    for name, measure in measures.items():
        for length in lengths:
            cells = []
            for form in forms:
                middle, deviation, seeds = spread_of(rows, form, length, measure)
                spread = f" ± {deviation:.{measure.digits}f}" if seeds > 1 else ""  # one has none
                text = f"{middle:.{measure.digits}f}{spread} ({seeds})"
                missing = "–" if (form, length) in there else MISSING
                cells.append(text if seeds else missing)
            if "–" not in cells or not {*cells} <= {"–", MISSING}:
                lines.append(f"| {' | '.join([name, str(length), *cells])} |")
    return "\n".join(lines)
