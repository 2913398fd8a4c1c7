"""What is said about training, as the committed results have it."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.training.rows import HARDER, LENGTHS, MEASURES, Measure, spread_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def result(device: str, task: str) -> dict[str, Any]:
    return json.loads((RESULTS / device / "train_toy" / f"{task}.json").read_text())


GPU_RESULTS = {"text": "nvidia-h100", "recall": "nvidia-h200"}
LONG_AND_SHORT = [(task, device, 4096) for task, device in GPU_RESULTS.items()]
LONG_AND_SHORT += [(task, "cpu", 256) for task in GPU_RESULTS]


@pytest.mark.parametrize(("task", "device", "tokens"), LONG_AND_SHORT)
def test_sparse_attention_learns_what_dense_attention_does(
    task: str, device: str, tokens: int
) -> None:
    found = result(device, task)
    nsa, dense = (found["summary"][kind] for kind in ("nsa", "dense"))
    assert found["config"]["seq_len"] == tokens
    if task == "text":
        assert nsa["validation_loss"] <= 1.02 * dense["validation_loss"]
    else:
        assert found["data"]["guessing"] == 0.125
        assert found["data"]["least_distance"] > tokens / 4
        assert min(nsa["accuracy"], dense["accuracy"]) > 0.98


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/train_toy/*.json")), ids=str)
def test_a_result_says_what_it_is_true_of(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["command"].startswith("python examples/train_toy.py")
    assert found["device"]
    assert {"python", "torch", "triton", "nsagen"} <= found["versions"].keys()
    for run in found["runs"].values():
        assert run["losses"]
        assert run["validations"][-1]["step"] == len(run["losses"])
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(("task", "device"), GPU_RESULTS.items())
def test_the_documentation_shows_the_committed_plots(task: str, device: str) -> None:
    """Its pages can show only what lies below them, so that it has copies."""
    shown = RESULTS.parents[1] / "docs" / "images" / f"train-{task}.png"
    assert shown.read_bytes() == (RESULTS / device / "train_toy" / f"{task}.png").read_bytes()


@pytest.mark.parametrize("name", [*MEASURES, "retrieval-longer", "continue"])
def test_the_page_of_evidence_shows_the_committed_plots(name: str) -> None:
    shown = RESULTS.parents[1] / "docs" / "images" / f"{name}.png"
    plot = RESULTS / "nvidia-h200" / "evidence" / f"{name}.png"
    assert shown.exists() == plot.exists()
    assert not plot.exists() or shown.read_bytes() == plot.read_bytes()


def evidence(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / "nvidia-h200" / "evidence" / f"{name}.json").read_text())


def test_the_page_of_evidence_concludes_from_the_committed_rows() -> None:
    rows = evidence("retrieval")["rows"]

    def reached(form: str, length: int, measure: Measure) -> float:
        mean, _, seeds = spread_of(rows, form, length, measure)
        assert seeds
        return mean

    tasks, forms = MEASURES["retrieval"], ("nsa", "dense", "infllm_v2")
    for form in forms:
        for length in LENGTHS[:2]:
            seeds = {row["seed"] for row in rows if (row["form"], row["length"]) == (form, length)}
            assert seeds == {0, 1, 2}
        for task in ("single, %", "several needles, %", "several keys, %"):
            assert reached(form, 4096, tasks[task]) > 98.8
            assert reached(form, 16384, tasks[task]) > 94.8
        for length in LENGTHS:
            assert reached(form, length, tasks["longer chains, %"]) < 35
        assert 42 < reached(form, 4096, tasks["variables, %"]) < 48
        assert 53.5 < reached(form, 4096, HARDER["16384 tokens, %"]) < 55.5
        assert reached(form, 4096, HARDER["65536 tokens, %"]) < 30
        for length, most in ((4096, 3), (16384, 8), (65536, 14)):
            few, many = tasks["several keys, %"], HARDER["12 of each other key, %"]
            assert reached(form, length, few) - reached(form, length, many) < most
    for length, least, most in ((4096, 75, 77.5), (16384, 69, 71)):
        assert all(least < reached(form, length, HARDER["as trained, %"]) < most for form in forms)
    for length in LENGTHS:
        trained = {form: reached(form, length, HARDER["as trained, %"]) for form in forms}
        for form, least, most in (("nsa", 4, 6.2), ("infllm_v2", 1, 3.1)):
            assert trained[form] - reached(form, length, HARDER["topk 8, %"]) < 2
            assert least < trained[form] - reached(form, length, HARDER["topk 4, %"]) < most
    longest = {
        form: [
            HARDER["as trained, %"].of(r) for r in rows if (r["form"], r["length"]) == (form, 65536)
        ]
        for form in forms
    }
    assert max(longest["dense"]) < min(longest["nsa"])
    assert min(longest["infllm_v2"]) < max(longest["dense"]) < max(longest["infllm_v2"])
    assert all(len(found) == 3 for found in longest.values())
    assert [(row["length"], row["seed"]) for row in rows if row["form"] == "msa"] == [(4096, 0)]
    one_lookup = ("single, %", "several needles, %", "several keys, %", "several values, %")
    assert min(reached("msa", 4096, tasks[task]) for task in one_lookup) > 98.7
    earlier = evidence("retrieval-1000-steps")["rows"]
    assert {row["form"] for row in earlier} == {*forms, "msa"}
    assert min(value for row in earlier for value in row["accuracy"].values()) > 0.99


def test_the_page_of_evidence_compares_losses_of_three_seeds() -> None:
    rows, loss = evidence("text")["rows"], MEASURES["text"]["loss, nats a byte"]
    nsa, dense = (
        {length: spread_of(rows, form, length, loss) for length in LENGTHS[:2]}
        for form in ("nsa", "dense")
    )
    assert {seeds for found in (nsa, dense) for _, _, seeds in found.values()} == {3}
    assert abs(nsa[4096][0] - dense[4096][0]) < min(nsa[4096][1], dense[4096][1])
    assert 0.16 < dense[16384][0] - nsa[16384][0] < 0.18


def test_swapping_a_dense_model_at_16384_tokens_costs_little() -> None:
    found = evidence("continue")
    before, between, after = found["measured"].values()
    assert found["config"]["seq_len"] == 16384
    assert 0 < before["loss"] - before["dense_loss"] < 0.002
    assert between["dense_loss"] - between["loss"] > 0.03
    assert after["loss"] < between["loss"]
