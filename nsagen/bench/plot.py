"""Figures of benchmark results: time over sequence length, each beside dense attention."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

PASSES = {"prefill": ("ms",), "train": ("forward_ms", "backward_ms")}
"""Which times of a result's rows are drawn."""

TITLES = {"ms": "forward", "forward_ms": "forward", "backward_ms": "backward"}


def plot(path: Path, out: Path | None = None) -> Path:
    """Draw the JSON of `nsagen bench prefill` or `train` as a PNG beside it.

    Args:
        path: the results.
        out: the figure; `path` with the suffix .png by default.

    Returns:
        the figure's path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(path.read_text())
    keys = PASSES[path.stem.split("-")[0]]
    figure, axes = pyplot.subplots(1, len(keys), figsize=(8.4 * len(keys), 4.8), squeeze=False)
    for key, axis in zip(keys, axes[0], strict=True):
        _draw(axis, content["rows"], key)
    about = content["provenance"]
    figure.suptitle("Native Sparse Attention against dense attention, one sequence", fontsize=12)
    note = (
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}: {about['command']}"
    )
    lines = textwrap.wrap(note, 105 * len(keys))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=7, color="gray", va="bottom")
    figure.tight_layout(rect=(0, 0.025 * (1 + len(lines)), 1, 1))
    out = out or path.with_suffix(".png")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def _draw(axis: Any, rows: list[dict[str, Any]], key: str) -> None:
    for name in dict.fromkeys(row["what"] for row in rows):
        drawn = [row for row in rows if row["what"] == name and key in row]
        whole = name == "attention" or name.startswith("dense")
        label = "NSA, whole attention" if name == "attention" else name
        axis.plot(
            [row["tokens"] for row in drawn],
            [row[key] for row in drawn],
            marker="o",
            markersize=4 if whole else 2,
            linewidth=2.2 if whole else 0.9,
            linestyle="-" if whole else "--",
            color=("tab:blue" if name == "attention" else "black") if whole else None,
            label=label,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel(f"{TITLES[key]}, ms")
    ticks = sorted({row["tokens"] for row in rows})
    axis.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
