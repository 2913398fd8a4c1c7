"""The retrieval tasks, the family in the toy model, and the script that measures them."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.training.config import PRESETS, ModelKind, config_of
from examples.training.data import IGNORED, Packed
from examples.training.forms import attend, index_losses
from examples.training.loop import Trainer, build_model
from examples.training.parallel import World
from examples.training.retrieval import (
    FIRST_LINK,
    FIRST_QUESTION,
    KINDS,
    VALUES,
    RetrievalMix,
    RetrievalTask,
)
from examples.training.rows import MEASURES, table
from nsagen.model.self_attention import attend_causally
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def answer_of(kind: str, question: int, needles: list[int]) -> int:
    """What a reader of the needles would say."""
    values = {needle // VALUES: needle for needle in needles if needle < FIRST_QUESTION}
    if kind == "several values":
        (other,) = {n for n in needles if n // VALUES == question // VALUES} - {question}
        return other
    key = question - FIRST_QUESTION
    if kind == "variables":
        links = dict(divmod(n - FIRST_LINK, 8) for n in needles if n >= FIRST_LINK)
        return values[links[key]]
    if kind == "several keys":
        assert sum(needle // VALUES == key for needle in needles) == 1
        return next(needle for needle in needles if needle // VALUES == key)
    return values[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 1])
def test_every_answer_follows_from_needles_far_back(kind: str, index: int) -> None:
    task = RetrievalTask(kind, 2048, seed=0, easier_steps=1)
    ids, targets = task.batch("train", index, 4)
    for row, answers in zip(ids.tolist(), targets.tolist(), strict=True):
        body, questions = row[: -task.questions], row[-task.questions :]
        places = [at for at, token in enumerate(body) if token < task.first_filler]
        assert min(places) >= task.first
        assert max(places) < task.last
        if index:  # no copies any more
            assert len(places) == task.needles * task.length
        needles = sorted({body[at] for at in places})
        assert answers[: len(body)] == [IGNORED] * len(body)
        assert answers[-task.questions :] == [answer_of(kind, q, needles) for q in questions]
        assert not {*answers[-task.questions :]} & {*questions}  # no question names an answer


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    mix = RetrievalMix(config_of("cpu", "retrieval", {}))
    ids, _ = mix.batch("train", 3, 16)
    assert torch.equal(mix.batch("train", 3, 16)[0], ids)
    for seed, index in ((0, 4), (1, 3)):
        other = RetrievalMix(config_of("cpu", "retrieval", {"seed": seed}))
        assert not torch.equal(other.batch("train", index, 16)[0], ids)


def test_sequences_grow_and_a_step_has_as_many_tokens() -> None:
    config = config_of("gpu", "retrieval", {"seq_len": 65536, "steps": 10})
    mix = RetrievalMix(config)
    steps = (0, 5, 7, 8, 9)
    found = [mix.batch("train", index, config.rows)[0].shape for index in steps]
    assert [shape[1] for shape in found] == [4096, 4096, 4096, 16384, 65536]
    assert {shape.numel() for shape in found} == {config.batch_tokens}
    assert mix.batch("validation", 0, 1)[0].shape == (1, 65536)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_window_and_no_forced_block_reaches_an_answer(preset: str) -> None:
    config = config_of(preset, "retrieval", {})
    task = RetrievalTask("single", config.seq_len, seed=0)
    form = config.infllm_v2_form()
    assert form.local_blocks * form.block_size <= config.window_size
    assert config.layers * (config.window_size - 1) < task.least_distance
    assert form.init_blocks * form.block_size <= task.first


def test_infllm_v2_is_dense_where_the_blocks_are_all_and_sparse_elsewhere() -> None:
    form = replace(config_of("cpu", "retrieval", {}).infllm_v2_form(), topk=8)
    torch.manual_seed(0)
    lengths = [128, 96, 256]
    q, k, v = (torch.randn(sum(lengths), heads, 32, requires_grad=True) for heads in (4, 2, 2))
    o = attend(form, q, k, v, lengths, lengths)
    dense = attend_causally(q, k, v, lengths, lengths)
    assert torch.allclose(o[:224], dense[:224], atol=1e-5)  # at most 8 blocks of 16
    assert not torch.allclose(o[-1], dense[-1], atol=1e-3)
    o.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("form", ["infllm_v2", "msa"])
def test_forms_start_from_the_same_weights(form: ModelKind) -> None:
    config = config_of("cpu", "retrieval", {"seq_len": 512})
    dense, sparse = (build_model(kind, config, CPU) for kind in ("dense", form))
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, sparse.state_dict()[name])
    part = Packed.of(*RetrievalTask("single", 512, 0).batch("train", 0, 1), CPU)
    outputs = [model(part.input_ids, part.cu_seqlens) for model in (dense, sparse)]
    assert torch.allclose(outputs[0][:64], outputs[1][:64], atol=1e-5)
    assert not torch.equal(outputs[0][-1], outputs[1][-1])


def test_an_index_learns_from_its_loss_alone_and_nothing_else_from_it() -> None:
    config = config_of("cpu", "retrieval", {"seq_len": 512})
    model = build_model("msa", config, CPU)
    part = Packed.of(*RetrievalTask("single", 512, 0).batch("train", 0, 1), CPU)
    logits = model(part.input_ids, part.cu_seqlens)
    losses = index_losses(model)
    assert len(losses) == config.layers
    for loss, of_index in ((torch.stack(losses).mean(), True), (logits.square().sum(), False)):
        model.zero_grad()
        loss.backward(retain_graph=True)
        learned = {
            name for name, x in model.named_parameters() if x.grad is not None and x.grad.any()
        }
        assert learned == {n for n, _ in model.named_parameters() if ("index_" in n) == of_index}


def test_training_brings_an_index_closer_to_the_attention() -> None:
    one_layer = {"seq_len": 256, "batch_tokens": 256, "layers": 1, "warmup_steps": 1}
    config = config_of("cpu", "retrieval", one_layer)
    trainer = Trainer("msa", config, RetrievalTask("single", 256, 0), None, World(0, 1, CPU))
    losses = []
    for step in range(5):
        trainer.step(step)
        losses.append(sum(index_losses(trainer.plain)).item())
    assert losses[-1] < 0.8 * losses[0]


def test_msa_is_refused_where_sequences_or_heads_are_shared_out() -> None:
    config = config_of("cpu", "retrieval", {"seq_len": 256})
    with pytest.raises(ValueError, match=r"msa trains whole sequences.*--cp 2 and --tp 1"):
        Trainer("msa", config, RetrievalTask("single", 256, 0), None, World(0, 2, CPU, cp=2))


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    script = ROOT / "examples" / "evidence.py"
    command = [str(script), "--tiny", "--device", "cpu", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(str(script.parent))
    return runpy.run_path(str(script))["main"]()


def test_a_call_goes_on_where_the_last_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--seconds", "0") == 0
    assert "0 of 24 runs are there" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path, "--seeds", "0", "--lengths", "256") == 0
    first = json.loads((tmp_path / "retrieval.json").read_text())["rows"]
    assert len(first) == 4
    assert all(row["accuracy"].keys() == KINDS.keys() for row in first)
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    assert not list((tmp_path / "checkpoints").iterdir())
    more = ("--forms", "dense", "--seeds", "0", "1", "--lengths", "256")
    assert run(monkeypatch, tmp_path, *more) == 0
    rows = json.loads((tmp_path / "retrieval.json").read_text())["rows"]
    assert rows[:4] == first
    assert [(row["form"], row["length"], row["seed"]) for row in rows[4:]] == [("dense", 256, 1)]
    assert run(monkeypatch, tmp_path, *more, "--steps", "3") == 2
    assert "of other settings; choose another --out" in capsys.readouterr().err


def test_a_run_that_is_stopped_goes_on_from_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--forms", "dense", "--seeds", "0", "--lengths", "256", "--steps", "4")
    with monkeypatch.context() as slow:  # a second passes from each look at the clock to the next
        slow.setattr(time, "monotonic", itertools.count().__next__)
        assert run(slow, tmp_path / "stopped", *one, "--seconds", "3") == 0
    assert "0 of 1 runs are there" in capsys.readouterr().out
    (folder,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    for out in ("stopped", "unbroken"):
        assert run(monkeypatch, tmp_path / out, *one) == 0
    stopped, unbroken = (
        json.loads((tmp_path / out / "retrieval.json").read_text())["rows"][0]
        for out in ("stopped", "unbroken")
    )
    assert stopped | {"seconds": 0} == unbroken | {"seconds": 0}


def test_an_unknown_form_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--forms", "dense", "moba") == 2
    assert "a form must be one of nsa, dense, infllm_v2, msa; got 'moba'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_length_without_room_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--lengths", "256", "128") == 2
    assert "several keys needs room for 29 values" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_text_is_another_task_with_results_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--task", "text", "--forms", "nsa", "--lengths", "256", "--seeds", "0", "1")
    assert run(monkeypatch, tmp_path, *one) == 0
    rows = json.loads((tmp_path / "text.json").read_text())["rows"]
    assert [row["accuracy"].keys() for row in rows] == [{"next byte"}] * 2
    assert "2 of 2 runs are there" in capsys.readouterr().out
    assert (tmp_path / "text.png").stat().st_size > 10_000


def test_the_table_says_what_is_missing() -> None:
    accuracy = dict.fromkeys(KINDS, 0.5)
    rows = [
        {"form": "dense", "length": 4096, "seed": seed, "accuracy": {**accuracy, "single": value}}
        for seed, value in enumerate((0.8, 0.9, 1.0))
    ]
    measures = MEASURES["retrieval"]
    shown = table(rows, ["nsa", "dense"], [4096, 16384], measures).splitlines()
    assert "| single, % | 4096 | not measured yet | 90.0 ± 10.0 (3) |" in shown
    assert "| single, % | 4096 | 80.0 (1) |" in table(rows[:1], ["dense"], [4096], measures)
    assert "| variables, % | 16384 | not measured yet | not measured yet |" in shown
