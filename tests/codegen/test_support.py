"""Default schedules compile for every target, fit it, and the documentation says what they use."""

import json
from pathlib import Path

import pytest

from nsagen.codegen.support import documented, measure, measure_one, page, spilling
from nsagen.codegen.target import KNOWN_TARGETS
from nsagen.codegen.template import default_schedule
from nsagen.spec import load_spec

ROWS = json.loads((Path(__file__).parents[2] / "docs" / "support.json").read_text("utf-8"))
WORKLOADS = documented()
MOST_STACK = 24
"""Bytes a thread: what compilers keep there without an array or a loop that spills."""


def wrong(rows):
    """What does not compile, does not fit, or spills."""
    slight = {
        (row["op"], row["pass"], row["target"])
        for row in rows
        if max((k["spill_bytes"] for k in row.get("kernels", ())), default=99) <= MOST_STACK
    }
    heavy = [r for r in rows if (r["op"], r["pass"], r["target"]) not in slight]
    return [*spilling(heavy), *(text for text in spilling(rows) if " needs " in text)]


def test_the_table_has_todays_default_schedules():
    """Else: python docs/generate.py --support."""
    expected = {
        (w.op, w.pass_, w.label, target): str(default_schedule(w, KNOWN_TARGETS[target]))
        for w in WORKLOADS
        for target in KNOWN_TARGETS
    }
    assert {(r["op"], r["pass"], r["workload"], r["target"]): r["schedule"] for r in ROWS} == (
        expected
    )


def test_no_default_schedule_spills():
    assert wrong(ROWS) == []


def test_a_row_that_does_not_compile_or_fit_is_wrong():
    kernel = {"kernel": "one", "spill_bytes": 40, "shared_bytes": 1 << 18}
    row = {"op": "rope", "pass": "forward", "workload": "w", "target": "cuda:90", "schedule": "s"}
    texts = list(spilling([{**row, "kernels": [kernel]}, {**row, "error": "no ptxas"}]))
    assert [text.rpartition(": ")[2] for text in texts] == [
        "one spills 40 bytes; s",
        "one needs 262144 of 232448 bytes",
        "no ptxas",
    ]


def test_the_page_counts_variants_and_spills():
    text = page(ROWS)
    for target in KNOWN_TARGETS:
        assert f"| `{target}` | {len(WORKLOADS)} |" in text


@pytest.mark.parametrize(
    ("op", "pass_", "target"),
    [
        ("gated_sum", "backward", "cuda:86"),
        ("sliding_window_attention", "forward", "hip:gfx942"),
        ("compress", "backward", "cuda:120"),
        ("compressed_attention", "decode", "cuda:100"),
    ],
)
def test_some_compile(op, pass_, target, tmp_path, monkeypatch):
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))
    workload = next(w for w in WORKLOADS if (w.op, w.pass_) == (op, pass_))
    assert wrong([measure_one(workload, target)]) == []


@pytest.mark.slow
def test_the_table_is_what_compiles_today():
    assert measure(WORKLOADS) == ROWS


@pytest.mark.slow
def test_every_workload_of_llama8b_compiles_for_every_target():
    assert wrong(measure(load_spec("llama8b").workloads())) == []
