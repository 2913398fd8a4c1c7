"""Tables of results: each length beside dense attention, with what the numbers are true of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsagen.bench.tables import markdown

ABOUT = {"device": "a GPU", "torch": "2", "triton": "3", "driver": "1", "command": "nsagen bench"}

ROWS: dict[str, list[dict[str, Any]]] = {
    "prefill": [
        {"what": "dense attention (cuDNN)", "tokens": 8, "ms": 4.0},
        {"what": "rope", "tokens": 8, "ms": 1.0},
        {"what": "attention", "tokens": 8, "ms": 2.0},
    ],
    "train": [
        {"what": "dense attention (cuDNN)", "tokens": 8, "backward_ms": 12.0},
        {"what": "dense attention (FlashAttention-4)", "tokens": 8, "backward_ms": 9.0},
        {"what": "attention", "tokens": 8, "backward_ms": 3.0, "peak_gib": 1.25},
    ],
    "side_by_side": [
        {"what": "forward, random selections", "tokens": 8, "ms": 2.0},
        {"what": "forward, learned selections", "tokens": 8, "ms": 1.5},
        {"what": "backward", "tokens": 8, "ms": 4.125},
        {"what": "dense attention (cuDNN)", "tokens": 8, "ms": 1.75},
        {"what": "M3 attention", "tokens": 9, "ms": 1.0},
    ],
    "decode": [
        {"what": "attention", "batch": 2, "tokens": 64, "ms": 0.5, "torch_ms": 0.25},
        {"what": "step, replayed", "batch": 2, "tokens": 64, "ms": 3.0},
    ],
    "training_table": [
        {
            **{"what": "step", "model": name, "attention": kind, "how": "compiled", "tokens": 8},
            **{"tokens_per_second": rate},
        }
        for name, kind, rate in (
            *(("8", "nsa", 3e3), ("8", "dense", 4e3)),
            *(("8, 4 layers", "dense", 4e3), ("8, 4 layers", "nsa", 5e3)),
            ("16", "nsa", 1e3),
        )
    ]
    + [
        {
            **{"what": "layer", "model": "X", "attention": kind, "how": "eager", "tokens": tokens},
            **times,
        }
        for tokens, kind, times in (
            (8, "nsa", {"forward_ms": 1.0, "backward_ms": 2.0}),
            (8, "dense", {"forward_ms": 2.0, "backward_ms": 4.0}),
            (16, "nsa", {"error": "out of memory"}),
            (16, "dense", {"forward_ms": 2.0, "backward_ms": 4.0}),
        )
    ],
    "serve": [
        {
            **{"over": "nsagen serve", "rate": 2.0, "requests": 14, "unfinished": 1},
            **{"new_tokens_s": 99.6, "first_token_ms_p50": 200.4, "first_token_ms_p99": 1000.0},
            **{"token_ms_p50": 12.34, "token_ms_p99": None},
        },
    ],
}

EXPECTED = {
    "prefill": ["| 8 | 4.0 ms | 2.0 ms | 2.0 x |"],
    "train": ["| 8 | 12.0 ms | 9.0 ms | 3.0 ms | 3.0 x | 1.2 GiB |"],
    "side_by_side": ["| 8 | 1.75 ms |  | 2.00 ms | 1.50 ms | 4.12 ms |"],
    "training_table": [
        "| a step, compiled | 8 | 4k tokens/s | 3k tokens/s | 0.75 x |",
        "| a step, compiled, 4 layers | 8 | 4k tokens/s | 5k tokens/s | 1.25 x |",
        "| a layer of X | 8 | 2.0 + 4.0 ms | 1.0 + 2.0 ms | 2.00 x |",
    ],
    "decode": ["| 2 | 64 | 0.250 ms | 0.500 ms | 0.5 x |"],
    "serve": ["| nsagen serve | 2 | 14 | 1 | 100 | 200 ms | 1000 ms | 12.3 ms |  |"],
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_a_measurement_of_the_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"provenance": ABOUT, "rows": ROWS[name]}))
    head, rule, *rows, blank, note = markdown(path).splitlines()
    assert head.count("|") == rule.count("|")
    assert rows == EXPECTED[name]
    assert (blank, note) == ("", "a GPU, torch 2, triton 3, driver 1: `nsagen bench`")


def test_a_column_is_there_where_any_row_has_a_number(tmp_path: Path) -> None:
    other = [{**row, "tokens": 16} for row in ROWS["prefill"]]
    flash = {**ROWS["prefill"][0], "what": "dense attention (FlashAttention-4)", "tokens": 16}
    path = tmp_path / "prefill.json"
    about = ABOUT | {"note": "16 tokens: of a later commit"}
    path.write_text(json.dumps({"provenance": about, "rows": [*ROWS["prefill"], *other, flash]}))
    head, _, first, second, _, note = markdown(path).splitlines()
    assert "| FlashAttention-4 |" in head
    assert first == "| 8 | 4.0 ms | not measured | 2.0 ms | 2.0 x |"
    assert second == "| 16 | 4.0 ms | 4.0 ms | 2.0 ms | 2.0 x |"
    assert note.endswith("`nsagen bench`; 16 tokens: of a later commit")
