"""Figures of benchmark results: time over sequence length, next to dense attention."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from nsagen.core.errors import InvalidInputError
from nsagen.core.files import check_own, replacing
from nsagen.core.version import __version__
from nsagen.reports.page import ALGORITHM_HUES

PASSES = {"prefill": ("ms",), "train": ("forward_ms", "backward_ms")}
"""The times of a result's rows to draw."""

TITLES = {"ms": "forward", "forward_ms": "forward", "backward_ms": "backward"}

NSA, DENSE, QUIET = ALGORITHM_HUES[0], "#1c2430", "#5a6675"
STYLE: Any = {
    **{"font.family": "sans-serif", "text.color": DENSE, "axes.labelcolor": QUIET},
    **{"xtick.color": QUIET, "ytick.color": QUIET, "axes.edgecolor": "#d6dbe2"},
    **{"grid.color": "#d6dbe2", "axes.spines.top": False, "axes.spines.right": False},
}
"""The ink, lines and colours of the pages that `nsagen inspect` and `tune` write, on white."""


_MARK = re.compile(rb"\A\x89PNG\r\n.*tEXtSoftware\0nsagen ", re.DOTALL)


def plot(path: Path, out: Path | None = None) -> Path:
    """Draw the JSON of a benchmark as a PNG beside it.

    Args:
        path: the results.
        out: the figure; `path` with the suffix .png by default.

    Returns:
        the figure's path.

    Raises:
        ImportError: matplotlib is not installed.
        InvalidInputError: the figure would replace a file that is not nsagen's, or `path` does not
            hold a benchmark's results.
    """
    out = out or path.with_suffix(".png")
    check_free(out)
    try:
        return _draw_figure(path, out)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidInputError(
            f"{path}: must be what nsagen bench wrote, by its name (prefill, train, decode); got "
            f"{type(error).__name__}: {error}; give such a file"
        ) from error


def _draw_figure(path: Path, out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(path.read_text(encoding="utf-8"))
    name, rows = path.stem.split("-")[0], content["rows"]
    decoding = name == "decode"
    if decoding:
        rows = [row for row in rows if row["what"] == "attention"]
    panels = sorted({row["batch"] for row in rows}) if decoding else PASSES[name]
    size = (8.4 * len(panels), 4.8)
    matplotlib.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        if decoding:
            _draw_decode(axis, [row for row in rows if row["batch"] == panel])
        else:
            _draw(axis, rows, panel)
    about = content["provenance"]
    what = "one token a sequence" if decoding else "one sequence"
    figure.suptitle(f"Native Sparse Attention against dense attention, {what}", fontsize=12)
    note = (
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}: {about['command']}"
    )
    lines = textwrap.wrap(note, 105 * len(panels))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=7, color=QUIET, va="bottom")
    figure.tight_layout(rect=(0, 0.025 * (1 + len(lines)), 1, 1))
    with replacing(out) as temporary:
        about = {"Software": f"nsagen {__version__}"}
        figure.savefig(temporary, format="png", dpi=120, metadata=about)
    pyplot.close(figure)
    return out


def check_free(path: Path) -> None:
    """Refuse to draw over a file that is not a figure of nsagen.

    Raises:
        InvalidInputError: names the file.
    """
    check_own(path, _MARK, "a figure", "plot a copy of the results in another folder")


def _draw(axis: Any, rows: list[dict[str, Any]], key: str) -> None:
    hues = iter(ALGORITHM_HUES[3:])
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
            color=(NSA if name == "attention" else DENSE) if whole else next(hues, QUIET),
            label=label,
        )
    axis.set_ylabel(f"{TITLES[key]}, ms")
    _finish(axis, rows)


def _draw_decode(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Time by context next to dense attention, and the least time to read the bytes."""
    for key, label, style in (
        ("torch_ms", "dense attention", {"color": DENSE}),
        ("ms", "NSA, whole attention", {"color": NSA}),
        ("floor_ms", "NSA, bytes alone", {"color": NSA, "linestyle": ":"}),
    ):
        drawn = [row for row in rows if row.get(key)]
        times = [row[key] for row in drawn]
        axis.plot([row["tokens"] for row in drawn], times, **style, marker="o", label=label)
    axis.set_title(f"batch {rows[0]['batch']}", fontsize=10)
    axis.set_ylabel("a layer and step, ms")
    _finish(axis, rows)


def _finish(axis: Any, rows: list[dict[str, Any]]) -> None:
    """What all panels share: logarithmic axes, marked at the measured lengths."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    ticks = sorted({row["tokens"] for row in rows})
    axis.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
    axis.grid(linewidth=0.6)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
