"""Benchmark results as tables for documents: every number in them was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]

FLASH_4 = "FlashAttention-4"
"""How rows call dense attention of the package flash-attn-4."""

MISSING = "not measured"
"""Where others of its column were measured; a column without any number is left out."""

HEADS = {
    "prefill": ("N", "dense: cuDNN", "FlashAttention-4", "NSA", "speedup"),
    "train": ("N", "dense: cuDNN", "FlashAttention-4", "NSA", "speedup", "peak memory"),
    "side_by_side": (
        *("N", "dense: cuDNN", "FlashAttention-4", "NSA, random", "NSA, learned", "NSA backward"),
    ),
    "decode": ("batch", "context", "dense attention", "NSA", "speedup"),
    "training_table": ("", "tokens", "dense attention", "NSA", "speedup"),
    "serve": (
        "",
        "requests a second",
        "requests",
        "cut off",
        "new tokens a second",
        "first token: p50",
        "p99",
        "a token after it: p50",
        "p99",
    ),
}
"""The columns of each benchmark's table."""


def markdown(path: Path) -> str:
    """The whole attention next to dense attention, or a server next to others, and what the numbers
    hold for.

    Args:
        path: JSON that `nsagen bench prefill`, `train`, `decode` or `serve` wrote, or
            benchmarks/side_by_side.py or training_table.py.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, about = content["rows"], content["provenance"]
    head = HEADS[path.stem]
    make = {
        **{"prefill": _prefill, "train": _train, "side_by_side": _side_by_side},
        **{"decode": _decode, "serve": _serve, "training_table": _training},
    }[path.stem]
    cells = [head, ["---:"] * len(head), *make(rows)]
    there = [{*column[2:]} != {MISSING} for column in zip(*cells, strict=True)]
    lines = [_line(list(compress(row, there))) for row in cells]
    versions = f"torch {about['torch']}, triton {about['triton']}, driver {about['driver']}"
    note = f"; {about['note']}" if "note" in about else ""
    return "\n".join([*lines, "", f"{about['device']}, {versions}: `{about['command']}`{note}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _prefill(rows: Rows) -> Iterator[list[str]]:
    for dense, ours in _beside_dense(rows):
        yield [str(ours["tokens"]), *_compared_with(dense, ours, "ms")]


def _train(rows: Rows) -> Iterator[list[str]]:
    for dense, ours in _beside_dense(rows):
        times = _compared_with(dense, ours, "backward_ms")
        yield [str(ours["tokens"]), *times, f"{ours['peak_gib']:.1f} GiB"]


def _side_by_side(rows: Rows) -> Iterator[list[str]]:
    """Milliseconds by length; what of a length was not measured is left out."""
    found = {(row["what"], row["tokens"]): row["ms"] for row in rows}
    for tokens in dict.fromkeys(row["tokens"] for row in rows if row["what"].startswith("forward")):
        times = [
            found.get((what, tokens))
            for what in (
                *("dense attention (cuDNN)", f"dense attention ({FLASH_4})"),
                *("forward, random selections", "forward, learned selections", "backward"),
            )
        ]
        yield [str(tokens), *("" if ms is None else f"{ms:.2f} ms" for ms in times)]


def _decode(rows: Rows) -> Iterator[list[str]]:
    for row in rows:
        if row["what"] == "attention":
            times = _compared(row["torch_ms"], row["ms"], digits=3)
            yield [str(row["batch"]), str(row["tokens"]), *times]


def _training(rows: Rows) -> Iterator[list[str]]:
    """A step's tokens/s, and a layer's forward and backward pass, each beside dense attention's."""
    kinds: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        names = tuple(row[name] for name in ("what", "model", "how", "tokens"))
        kinds.setdefault(names, {})[row["attention"]] = row
    for (what, model, how, tokens), of in kinds.items():
        if any("error" in row for row in of.values()) or len(of) < 2:
            continue
        dense, ours = of["dense"], of["nsa"]
        if what == "step":
            # "8192, 4 layers of 32 heads of 128": a model that is not the example's own
            name = f"a step, {how}{''.join(model.partition(',')[1:])}"
            rates = [row["tokens_per_second"] for row in (dense, ours)]
            cells = [f"{rate / 1e3:.0f}k tokens/s" for rate in rates]
            yield [name, str(tokens), *cells, f"{rates[1] / rates[0]:.2f} x"]
        else:
            times = [(row["forward_ms"], row["backward_ms"]) for row in (dense, ours)]
            cells = [f"{forward:.1f} + {backward:.1f} ms" for forward, backward in times]
            speedup = sum(times[0]) / sum(times[1])
            yield [f"a layer of {model}", str(tokens), *cells, f"{speedup:.2f} x"]


def _serve(rows: Rows) -> Iterator[list[str]]:
    for row in rows:
        times = [
            "" if row[name] is None else f"{row[name]:.{digits}f} ms"
            for name, digits in (
                ("first_token_ms_p50", 0),
                ("first_token_ms_p99", 0),
                ("token_ms_p50", 1),
                ("token_ms_p99", 1),
            )
        ]
        counts = [f"{row['rate']:g}", str(row["requests"]), str(row["unfinished"])]
        yield [row["over"], *counts, f"{row['new_tokens_s']:.0f}", *times]


def _beside_dense(rows: Rows) -> Iterator[tuple[dict[str, Mapping[str, Any]], Mapping[str, Any]]]:
    """For each length, dense attention by its names, and our whole attention."""
    for ours in rows:
        if ours["what"] == "attention":
            same = (row for row in rows if row["tokens"] == ours["tokens"])
            yield {row["what"]: row for row in same if row["what"].startswith("dense")}, ours


def _compared_with(
    dense: Mapping[str, Mapping[str, Any]], ours: Mapping[str, Any], key: str
) -> list[str]:
    """The times, and the speedup over the fastest dense attention."""
    found = [dense.get(f"dense attention ({name})") for name in ("cuDNN", FLASH_4)]
    cells = [f"{row[key]:.1f} ms" if row else MISSING for row in found]
    fastest = min(row[key] for row in dense.values())
    return [*cells, *_compared(fastest, ours[key])[1:]]


def _compared(dense: float, ours: float, digits: int = 1) -> list[str]:
    return [f"{dense:.{digits}f} ms", f"{ours:.{digits}f} ms", f"{dense / ours:.1f} x"]
