"""The script that continues a dense model as NSA, and what it came to."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from nsagen.integrations.transformers_attention import TransformersNSA
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = {"cpu": "continue-training.png", "nvidia-h200": "continue-training-h200.png"}


@pytest.mark.usefixtures("one_thread")
def test_a_dense_model_is_swapped_and_trained_in_two_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / "examples" / "continue_training.py"
    sizes = "--device cpu --seq-len 64 --batch-tokens 128 --corpus-mib 1"
    steps = "--dense-steps 2 --new-steps 1 --all-steps 1"
    command = [str(script), *sizes.split(), *steps.split(), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    found = json.loads((tmp_path / "continue.json").read_text())
    assert [one["step"] for one in found["measured"].values()] == [0, 1, 2]
    assert found["measured"]["before"]["distance"] < 0.05  # the window and the blocks see all
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")
    assert isinstance(model.model.layers[0].self_attn, TransformersNSA)


def measured(device: str) -> dict[str, Any]:
    return json.loads((RESULTS / device / "continue_training" / "continue.json").read_text())[
        "measured"
    ]


@pytest.mark.parametrize("device", IMAGES)
def test_each_stage_lowers_the_loss(device: str) -> None:
    before, between, after = measured(device).values()
    assert before["loss"] > between["loss"] > after["loss"]


def test_where_the_window_and_the_blocks_see_all_it_starts_close() -> None:
    assert measured("cpu")["before"]["distance"] < 0.05


@pytest.mark.parametrize("device", IMAGES)
def test_the_page_has_the_committed_numbers(device: str) -> None:
    page = (ROOT / "docs" / "transformers.md").read_text()
    for name, one in measured(device).items():
        assert f"| {name} | {one['loss']:.3f} | {one['distance']:.3f} |" in page
    shown = ROOT / "docs" / "images" / IMAGES[device]
    results = RESULTS / device / "continue_training" / "continue.png"
    assert shown.read_bytes() == results.read_bytes()
