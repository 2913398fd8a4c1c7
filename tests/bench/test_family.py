"""benchmarks/family.py, with sizes for a CPU."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family import GOALS, compile_and_verify, draw, goals, run_all, updated, wrong_of
from family_attention import choose
from family_run import TINY
from family_schedules import calls, launch_of

from nsagen.ops import reference


@pytest.mark.parametrize("share", [1, 16])
def test_choices_are_as_selection_writes_them(share: int) -> None:
    layer = TINY.minicpm
    topk_idx = choose(TINY, layer, 100, share)
    for token in (0, 5, 40, 99):
        row = topk_idx[0, token]
        real, own = row[row >= 0].tolist(), token // layer.block
        assert real == sorted(set(real))
        assert len(real) == min(layer.topk, own + 1)
        forced = reference.forced_blocks(
            torch.tensor([token]), block_size=8, init_blocks=1, local_blocks=3
        )
        assert set(forced[forced >= 0].tolist()) <= set(real)


def test_parts_run_with_tiny_sizes(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    parts = ["m3_attention", "m3_decode", "m3_index_loss", "moba"]
    run_all(TINY, math.inf, parts, (), lambda found: saved.append(copy.deepcopy(found)))
    content = saved[-1]
    counts = [len(found["rows"]) for found in saved]
    assert set(counts) == set(range(1, len(content["rows"]) + 1))  # a stopped run keeps its rows
    assert not content["wrong"]
    assert not content["failed"]
    assert {row["what"] for row in content["rows"]} >= {"M3 attention forward", "M3 decode index"}
    loss = [row["how"] for row in content["rows"] if row["what"] == "M3 index loss backward"]
    assert set(loss) == {"default", "dense", "dense, PyTorch"}
    pytest.importorskip("matplotlib")
    draw(content, tmp_path / "family.png")
    assert (tmp_path / "family.png").stat().st_size > 10_000


def test_a_spec_that_cannot_be_verified_is_a_failure(tmp_path: Path) -> None:
    failed, rows = compile_and_verify(tmp_path, 120, [], ("nowhere",))
    assert not rows
    assert "nowhere" in failed["verify nowhere"]


def test_an_output_that_fails_to_verify_is_wrong() -> None:
    row = {"spec": "moba", "variant": "x", "output": "o", "error": None}
    found = wrong_of([row | {"result": "failed"}, row | {"output": "lse", "result": "passed"}])
    assert found == {"moba: x o": math.inf}


def test_goals_take_the_best_row() -> None:
    rows = [{"what": "M3 attention forward", "tokens": 8192, "ms": ms} for ms in (3.0, 2.7, 1.0)]
    rows = [
        r | {"how": how} for r, how in zip(rows, ("gathered", "band", "band alone"), strict=True)
    ]
    found = {(g["what"], g["tokens"]): g for g in goals(rows)}
    assert found["M3 attention forward", 8192]["ms"] == 2.7
    assert found["M3 attention forward", 8192]["met"]
    assert len(found) == sum(len(by_tokens) for by_tokens in GOALS.values())


def test_every_schedule_that_is_compared_can_be_made(tmp_path: Path) -> None:
    names = [call.name for call in calls()]
    assert len(set(names)) == len(names)
    for call in calls():
        for knobs in call.schedules:
            assert callable(launch_of(call, knobs, tmp_path))


def test_rows_that_a_run_did_not_measure_are_kept_with_the_run_that_did() -> None:
    def run(torch: str, *whats: str) -> dict[str, Any]:
        rows = [{"what": what, "how": "gathered", "tokens": 8192, "ms": 3.0} for what in whats]
        facts = {"device": "an H200", "torch": torch, "triton": "3.6.0"}
        return {**facts, "rows": rows, "published": {}, "goals": []}

    index, attention = "M3 index and top-k", "M3 attention forward"
    second = updated(run("2.11", index, attention), run("2.12", index))
    of = {row["what"]: row.get("run") for row in second["rows"]}
    assert of == {index: None, attention: 0}
    assert [r["torch"] for r in second["runs"]] == ["2.11"]
    third = updated(second, run("2.13", "M3 attention backward"))
    of = {row["what"]: third["runs"][row["run"]]["torch"] for row in third["rows"] if "run" in row}
    assert of == {index: "2.12", attention: "2.11"}
