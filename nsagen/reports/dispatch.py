"""Which kernel serves which workload and size, as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from itertools import groupby
from typing import Any

from nsagen.reports.page import ALGORITHM_HUES, legend
from nsagen.runtime.dispatcher import Dispatcher

LARGEST = 1 << 20
"""Where an unlimited range ends in the picture."""


def section(dispatcher: Dispatcher, manifest: Mapping[str, Any], target: str) -> str:
    """One row per workload; its variants side by side, as wide as the logarithm of their sizes."""
    rows = [row for row in dispatcher.describe() if row["target"] == target]
    variants: Mapping[str, Any] = manifest["variants"]
    algorithms = sorted({str(variants[row["variant"]]["algorithm"]) for row in rows})
    hues = {name: ALGORITHM_HUES[i % len(ALGORITHM_HUES)] for i, name in enumerate(algorithms)}
    parts = [
        f"<h2>Which kernel serves which call on {escape(target)}</h2>",
        "<p>A row is a workload; from left to right, calls of more tokens. Each says "
        "its schedule and its source; hover over it for the kernel's name.</p>",
        legend((hue, name.replace("_", " ")) for name, hue in hues.items()),
    ]
    for (op, pass_), group in groupby(rows, key=lambda row: (row["op"], row["pass"])):
        parts.append(f"<h3>{escape(op)} {escape(pass_)}</h3>")
        for _, choices in groupby(group, key=lambda row: (row["dtype"], row["params"])):
            parts.append(_row(list(choices), variants, hues))
    return "\n".join(parts)


def _row(choices: list[dict[str, Any]], variants: Mapping[str, Any], hues: dict[str, str]) -> str:
    label = choices[0]["variant"].split("__")[1]
    spans = []
    for choice in choices:
        variant = variants[choice["variant"]]
        schedule = ", ".join(f"{name}={value}" for name, value in variant["schedule"].items())
        spans.append(
            f'<span style="flex-grow:{_width(choice["tokens"], choice["context"]):.3g};'
            f'--algorithm:{hues[variant["algorithm"]]}" title="{escape(choice["variant"])}">'
            f"<b>{escape(_served(choice))}</b> <i>{escape(schedule)}; "
            f"{escape(_provenance(variant, choice))}</i></span>"
        )
    return f'<div class="row"><code>{label}</code><div class="track">{"".join(spans)}</div></div>'


def _served(choice: dict[str, Any]) -> str:
    return choice["sizes"] + (f", Triton {choice['triton']}" if choice["triton"] else "")


def _provenance(variant: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    """Why the variant has its schedule: for each use of it, or one reason for all."""
    for use in variant.get("uses", ()):
        if (use["target"], use["sizes"]) == (choice["target"], choice["sizes"]):
            return use["provenance"]
    return variant.get("provenance", "")


def _width(tokens: tuple[int | None, int | None], context: tuple[int | None, int | None]) -> float:
    """Powers of two that a bucket spans, of the size that it limits."""
    least, greatest = context if tokens == (None, None) else tokens
    return max(1.0, math.log2((greatest or LARGEST) / max(1, least or 1)))
