"""The decoding benchmark at a size for a CPU: its rows, floors, files, and how it is started."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nsagen.bench import decode, measure
from nsagen.bench.decode_cases import AttentionCaches, layer_shapes, layer_x, step_bytes
from nsagen.bench.dense import dense, dense_grouped
from nsagen.bench.plot import plot
from nsagen.model import InferenceConfig, ToyNSALlama
from nsagen.ops import linear_decode
from tests.model.tiny import nsa_config

TINY = decode.Plan(
    batches=(1, 2),
    contexts=(20, 40),
    attention=nsa_config(num_hidden_layers=1),
    model=nsa_config(),
    step_batch=2,
    step_context=24,
    new_tokens=3,
    dtype=torch.float32,
)
CPU = torch.device("cpu")


@pytest.fixture
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run once and take a millisecond; the GPU can do 1e12 of everything."""

    def once(call: Callable[[], object]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(decode, "milliseconds", once)
    monkeypatch.setattr(decode, "host_milliseconds", once)
    monkeypatch.setattr(decode, "graphed", lambda call: call)
    monkeypatch.setattr(decode, "measure_ceilings", lambda: measure.Ceilings(1e12, 1e12))


@pytest.mark.usefixtures("_without_a_gpu")
def test_a_row_of_narrow_caches_beside_each() -> None:
    """It reads a byte for each element, and 4 for a scale."""
    rows = decode.run(dataclasses.replace(TINY, model=None, cache_dtype="int8"), device="cpu")
    pairs = [row for row in rows if row["what"].startswith("attention")]
    assert [row["what"] for row in pairs[:2]] == ["attention", "attention, int8 caches"]
    queries = 4 * 4 * 32
    assert (pairs[1]["bytes"] - queries) / (pairs[0]["bytes"] - queries) == (32 + 4) / (4 * 32)


@pytest.mark.usefixtures("_without_a_gpu")
def test_a_row_for_each_size_op_layer_and_step(tmp_path: Path) -> None:
    seen: list[str] = []
    kept: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append(f"{done}/{total}")

    rows = decode.run(TINY, progress, "cpu", keep=lambda rows: kept.append(len(rows)))
    assert kept == [1 + place for place in range(len(rows))]
    what = [row["what"] for row in rows]
    assert what.count("attention") == 4
    assert sum(name.startswith("host: ") for name in what) == 6
    assert sum(name.startswith("linear: ") for name in what) == 2 * 5
    assert [name for name in what if name.startswith("step, ")] == what[-3:]
    assert seen == [f"{done}/{len(rows)}" for done in range(len(rows))]
    for row in rows:
        assert row["ms"] > 0
        assert ("floor_ms" in row) == (not row["what"].startswith("host"))
        assert ("of_torch" in row) == row["what"].startswith(("attention", "linear"))
    path = decode.save(rows, tmp_path)
    assert json.loads(path.read_text())["rows"] == rows
    for row in rows:
        assert all(format(row[key], form) for key, form in decode.COLUMNS.items() if key in row)


@pytest.mark.usefixtures("_without_a_gpu")
def test_attention_only_and_its_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = decode.plan_of([1], [32], attention_only=True)
    assert plan.model is None
    rows = decode.run(decode.replace(TINY, model=None), None, "cpu")
    assert {row["what"].split(":")[0] for row in rows} == {"attention", "host"}
    figure = plot(decode.save(rows, tmp_path))
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_floors_count_what_must_be_read() -> None:
    """The guide's step: 4.45 GB of weights. 32 sequences of 32768: 0.055 ms at 4.27 TB/s."""
    limits = InferenceConfig(4, 8192)
    with torch.device("meta"):
        model = ToyNSALlama(decode.GUIDE, limits).to(torch.bfloat16)
    shapes = layer_shapes(decode.GUIDE)
    weights = {name: 2 * n * k for name, (n, k) in shapes.items()}
    total = 8 * (sum(weights.values()) - weights["lm_head"]) + weights["lm_head"]
    assert total == pytest.approx(4.45e9, rel=0.005)
    assert total < step_bytes(model, 4, 4096) < 1.01 * total
    caches = AttentionCaches(decode.ATTENTION, 32, 32768, torch.device("meta"), torch.bfloat16)
    assert caches.bytes_read() / 4.27e12 == pytest.approx(55e-6, rel=0.02)
    assert caches.dense_bytes() / caches.bytes_read() == pytest.approx(9.1, rel=0.02)


def test_both_dense_forms_are_the_same_attention() -> None:
    caches = AttentionCaches(nsa_config(num_hidden_layers=1), 2, 40, CPU, torch.float64)
    cache = (caches.q, caches.cache.k, caches.cache.v)
    torch.testing.assert_close(dense(*cache).flatten(1), dense_grouped(*cache).flatten(1))
    assert caches.sparse().shape == (2, 4, 32)


@pytest.mark.parametrize("name", layer_shapes(decode.GUIDE))
def test_layers_are_called_as_a_step_does(name: str) -> None:
    shape = layer_shapes(nsa_config())[name]
    x, weight, around = layer_x(name, shape, 3, CPU, torch.float32)
    out_features = shape[0] // 2 if around.get("swiglu") else shape[0]
    assert linear_decode(x, weight, **around).shape == (3, out_features)


def test_measuring_needs_little() -> None:
    blocked = "pydantic", "optuna", "yaml", "jinja2", "typer", "matplotlib"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from nsagen.bench import decode, prefill, train"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
