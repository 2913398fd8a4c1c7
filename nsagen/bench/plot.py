"""Figures of benchmark results, next to dense attention: by sequence length, or by load."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nsagen.bench.tables import FLASH_4
from nsagen.core.errors import InvalidInputError
from nsagen.core.files import check_own, replacing
from nsagen.core.version import __version__
from nsagen.reports.page import ALGORITHM_HUES

PASSES = {"prefill": ("ms",), "train": ("forward_ms", "backward_ms")}
"""The times of a result's rows to draw."""

LOADED = {
    "new_tokens_s": "new tokens a second",
    "first_token_ms": "time to the first token, ms",
    "token_ms": "time a token after it, ms",
}
"""What of a server under load to draw."""

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
            f"{path}: must be what nsagen bench wrote, by its name (prefill, train, decode or "
            f"serve); got {type(error).__name__}: {error}; give such a file"
        ) from error


def _draw_figure(path: Path, out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(path.read_text(encoding="utf-8"))
    title, panels = _panels(path.stem.split("-")[0], content["rows"])
    size = (8.4 * len(panels), 4.8)
    matplotlib.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for draw, axis in zip(panels, axes[0], strict=True):
        draw(axis)
    about = content["provenance"]
    figure.suptitle(title, fontsize=12)
    note = (
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}: {about['command']}"
    )
    lines = textwrap.wrap(note, 105 * len(panels))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=8, color=QUIET, va="bottom")
    figure.tight_layout(rect=(0, 0.025 * (1 + len(lines)), 1, 1))
    with replacing(out) as temporary:
        about = {"Software": f"nsagen {__version__}"}
        figure.savefig(temporary, format="png", dpi=120, metadata=about)
    pyplot.close(figure)
    return out


def _panels(name: str, rows: list[dict[str, Any]]) -> tuple[str, list[Callable[[Any], None]]]:
    """A figure's title, and what draws each of its panels."""
    title = "Native Sparse Attention against dense attention, "
    if name == "serve":
        row = rows[0]
        lengths = (f"{low} to {high}" for low, high in (row["prompt"], row["new"]))
        title = "Requests under load, prompts of {} tokens, answers of {}".format(*lengths)
        return title, [partial(_draw_serve, rows=rows, key=key) for key in LOADED]
    if name == "decode":
        drawn = [row for row in rows if row["what"] == "attention"]
        batches = [
            [row for row in drawn if row["batch"] == batch]
            for batch in sorted({row["batch"] for row in drawn})
        ]
        return f"{title}one token a sequence", [partial(_draw_decode, rows=one) for one in batches]
    return f"{title}one sequence", [partial(_draw, rows=rows, key=key) for key in PASSES[name]]


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
            linestyle=":" if FLASH_4 in name else "-" if whole else "--",
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


def _draw_serve(axis: Any, rows: list[dict[str, Any]], key: str) -> None:
    """One measure by arrivals a second; of times, the median and, dashed, the 99th percentile."""
    hues = iter((NSA, *ALGORITHM_HUES[3:]))
    styles = {key: "-"} if key in rows[0] else {f"{key}_p50": "-", f"{key}_p99": "--"}
    for over in dict.fromkeys(row["over"] for row in rows):
        hue = DENSE if "dense" in over else next(hues, QUIET)
        own = sorted((row for row in rows if row["over"] == over), key=lambda row: row["rate"])
        for name, style in styles.items():
            drawn = [row for row in own if row[name] is not None]
            axis.plot(
                [row["rate"] for row in drawn],
                [row[name] for row in drawn],
                marker="o",
                markersize=4,
                linestyle=style,
                color=hue,
                label=f"{over}, p99" if style == "--" else over,
            )
    axis.set_xlabel("requests a second")
    axis.set_ylabel(LOADED[key])
    _finish_at(axis, {row["rate"]: f"{row['rate']:g}" for row in rows})


def _finish(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Mark the measured lengths."""
    axis.set_xlabel("tokens")
    _finish_at(axis, {row["tokens"]: f"{row['tokens'] // 1024}k" for row in rows})


def _finish_at(axis: Any, ticks: dict[float, str]) -> None:
    """What all panels share: logarithmic axes, marked where something was measured."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted(ticks), [ticks[place] for place in sorted(ticks)])
    axis.grid(linewidth=0.6)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
