"""docs/family.md says what benchmarks/results/nvidia-h200/family.json says."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.docs.blocks import DOCS, ROOT

RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h200" / "family.json"
MEASURED = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
PAGE = (DOCS / "family.md").read_text(encoding="utf-8").splitlines()
TOKENS = (8192, 32768, 131072)


def figure(what: str, how: str, tokens: int, key: str = "ms") -> str:
    """Three digits; nothing where it was not measured."""
    for row in MEASURED:
        if (row["what"], row["how"], row["tokens"]) == (what, how, tokens):
            return f"{row[key]:#.3g}".rstrip(".")
    return ""


def both(what: str, how: str, tokens: int) -> str:
    passes = (figure(f"{what} {pass_}", how, tokens) for pass_ in ("forward", "backward"))
    return " / ".join(passes).strip()


def rows() -> Iterator[tuple[str, list[str]]]:
    """The start of a row's label, and its cells."""
    m3, minicpm, scores = "M3 attention", "MiniCPM attention", "MiniCPM scores and top-k"
    yield "M3: index", [figure("M3 index and top-k", "default", n) for n in TOKENS]
    yield "M3: selected", [both(m3, "gathered", n) for n in TOKENS]
    yield "the same, a token's own block", [both(m3, "band", n) for n in TOKENS]
    pairs = [(figure(scores, "exact", n), figure(scores, "coarse", n)) for n in TOKENS[1:]]
    yield "MiniCPM: scores", ["", *(f"{exact} ({coarse})" for exact, coarse in pairs)]
    yield "MiniCPM: selected", ["", *(both(minicpm, "band", n) for n in TOKENS[1:])]
    together = [figure("MiniCPM forward with scores", "exact, band", n) for n in TOKENS[1:]]
    yield "both, exact", ["", *together]
    gathered = [both(minicpm, "gathered", n) for n in TOKENS[1:]]
    yield "the same, local blocks gathered", ["", *gathered]
    wide = [figure(f"MiniCPM 64 blocks {p}", "band", 262144) for p in ("forward", "backward")]
    yield "nsagen, attention alone", wide
    for label, how, tokens in (
        ("nsagen, 8192", "nsagen", 8192),
        ("SDPA with a mask", "sdpa", 8192),
        ("nsagen, 131072", "nsagen", 131072),
    ):
        what = "M3 layer in Transformers"
        yield label, [figure(what, how, tokens, key) for key in ("ms", "peak_gib")]


@pytest.mark.parametrize(("label", "cells"), rows(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_row_has_the_measured_figures(label: str, cells: list[str]) -> None:
    (line,) = (line for line in PAGE if line.startswith(f"| {label}"))
    assert [cell.strip() for cell in line.strip("|").split("|")[1:]] == cells
