"""Draws family.py's results: time over tokens of dense attention, of others and of nsagen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        lines: of our own run: label -> (what, how) of the rows, the first that has some.
        others: what of `published` is shown beside them.
    """

    title: str
    lines: dict[str, tuple[tuple[str, str], ...]]
    others: tuple[str, ...] = ()


def _line(what: str, *hows: str) -> tuple[tuple[str, str], ...]:
    return tuple((what, how) for how in hows)


M3, CPM, WIDE = "M3 attention", "MiniCPM attention", "MiniCPM 64 blocks"
AGREE = "gathered, 16 neighbours agree"
PANELS = (
    Panel(
        "MiniMax-M3: attention, forward",
        {
            "nsagen, random selections": _line(f"{M3} forward", "gathered"),
            "nsagen, 16 neighbours agree": _line(f"{M3} forward", AGREE),
            "dense, cuDNN": _line("dense attention forward", "cuDNN, 64 heads over 4"),
        },
        (f"{M3} forward",),
    ),
    Panel(
        "MiniMax-M3: attention, backward",
        {"nsagen": _line(f"{M3} backward", "gathered", "gathered, pipeline (the default since)")},
        (f"{M3} backward",),
    ),
    Panel(
        "MiniMax-M3: index scores and top-k",
        {"nsagen": _line("M3 index and top-k", "default")},
        ("M3 index and top-k",),
    ),
    Panel(
        "MiniMax-M3: decoding step, 32 rows",
        {"nsagen": _line("M3 decode, batch 32", "graph")},
        ("M3 decode, batch 32",),
    ),
    Panel(
        "MiniCPM4: attention",
        {
            "nsagen, forward": _line(f"{CPM} forward", "band"),
            "nsagen, scores and forward": _line("MiniCPM forward with scores", "exact, band"),
            "nsagen, backward": _line(f"{CPM} backward", "band"),
        },
    ),
)


def points_of(
    rows: list[dict[str, Any]], line: tuple[tuple[str, str], ...]
) -> list[tuple[int, float]]:
    """(tokens, ms) of a line, ascending."""
    for what, how in line:
        of = {r["tokens"]: r["ms"] for r in rows if (r["what"], r["how"]) == (what, how)}
        if of:
            return sorted(of.items())
    return []


def draw(content: dict[str, Any], out: Path) -> None:
    """Write the figure; what the results lack is not drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from nsagen.bench.plot import DENSE, NSA, STYLE

    rows, published = [row for row in content["rows"] if "ms" in row], content["published"]
    colours = dict(zip(published, ("C1", "C2", "C3", "C4", "C5"), strict=False))
    with mpl.rc_context({**STYLE, "font.size": 9}):
        figure, axes = plt.subplots(2, 3, figsize=(13.5, 8))
        *of_lengths, last = axes.flat
        for axis, panel in zip(of_lengths, PANELS, strict=True):
            for i, (label, line) in enumerate(panel.lines.items()):
                dense = label.startswith("dense")
                style: dict[str, Any] = {"color": DENSE if dense else NSA, "marker": "os^"[i]}
                style["linestyle"] = "-" if dense or not i else (0, (1, 1.2))
                if points := points_of(rows, line):
                    axis.plot(*zip(*points, strict=True), label=label, **style)
            for whose, of_peer in published.items():
                for what in panel.others:
                    points = sorted((int(n), ms) for n, ms in of_peer.get(what, {}).items())
                    if points:
                        style = {"linestyle": "--", "marker": "x", "color": colours[whose]}
                        axis.plot(*zip(*points, strict=True), label=whose, **style)
            axis.set(title=panel.title, xlabel="tokens", ylabel="milliseconds")
            axis.set(xscale="log", yscale="log")
            lengths = sorted({int(n) for line in axis.lines for n in line.get_xdata()})
            axis.xaxis.set_major_locator(FixedLocator(lengths))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{int(n):,}"))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_minor_locator(NullLocator())
            axis.grid(linewidth=0.6)
            if axis.lines:
                axis.legend(fontsize=7.5, frameon=False)
        _bars(last, rows, published)
        facts = f"{content['device']}, torch {content['torch']}, triton {content['triton']}"
        figure.suptitle(f"{facts}, bfloat16, heads of 128; dashed: measured or published elsewhere")
        figure.tight_layout()
        figure.savefig(out, dpi=110)
        plt.close(figure)


def _bars(axis: Any, rows: list[dict[str, Any]], published: dict[str, Any]) -> None:
    """The times at one size: ours above those of others."""
    from nsagen.bench.plot import NSA, QUIET

    bars = []
    for pass_ in ("forward", "backward"):
        what = f"{WIDE} {pass_}"
        bars += [(f"nsagen, {pass_}", ms, NSA) for _, ms in points_of(rows, _line(what, "band"))]
        for whose, of_peer in published.items():
            for ms in of_peer.get(what, {}).values():
                bars.append((f"{whose.split(',')[0]}\n{pass_}, H100, published", ms, QUIET))
    for place, (_, ms, colour) in enumerate(reversed(bars)):
        axis.barh(place, ms, color=colour)
        axis.text(ms, place, f" {ms:.0f}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)], fontsize=7.5)
    axis.set(title="MiniCPM4: 64 blocks, 2 x 131,072 tokens", xlabel="milliseconds")
    axis.margins(x=0.15)
