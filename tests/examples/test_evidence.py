"""The retrieval tasks, the family in the toy model, and the script that measures them."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.training.config import PRESETS, ModelKind, config_of, continued
from examples.training.data import IGNORED, Packed
from examples.training.forms import attend, index_losses
from examples.training.loop import Trainer, build_model
from examples.training.parallel import World
from examples.training.retrieval import (
    CROWD,
    FIRST_LINK,
    FIRST_QUESTION,
    KINDS,
    VALUES,
    RetrievalMix,
    RetrievalTask,
)
from examples.training.rows import HARDER, MEASURES, table
from nsagen.model.self_attention import attend_causally
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[2] / "examples" / "evidence.py"
CPU = torch.device("cpu")


def answer_of(kind: str, question: int, needles: list[int]) -> int:
    """What a reader of the needles would say."""
    values = {needle // VALUES: needle for needle in needles if needle < FIRST_QUESTION}
    if kind == "several values":
        (other,) = {n for n in needles if n // VALUES == question // VALUES} - {question}
        return other
    key = question - FIRST_QUESTION
    if kind in ("variables", "longer chains"):
        links = dict(divmod(n - FIRST_LINK, 8) for n in needles if n >= FIRST_LINK)
        followed = 0
        while key not in values:
            key, followed = links[key], followed + 1
        assert followed == (1 if kind == "variables" else 2)
        return values[key]
    if kind in ("several keys", CROWD):
        assert sum(needle // VALUES == key for needle in needles) == 1
        return next(needle for needle in needles if needle // VALUES == key)
    return values[key]


@pytest.mark.parametrize("kind", [*KINDS, CROWD])
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


def test_only_a_run_that_starts_from_scratch_has_copies_at_first() -> None:
    config = config_of("gpu", "retrieval", {"seq_len": 16384, "steps": 10})
    assert [RetrievalMix(config, easier).easier_steps for easier in (True, False)] == [6, 0]
    further = continued(config)
    assert (further.steps, further.warmup_steps) == (2, 2)
    assert further.learning_rate == pytest.approx(0.3 * config.learning_rate)


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
    command = [str(SCRIPT), "--tiny", "--device", "cpu", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT))["main"]()


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "retrieval.json").read_text())["rows"]


def test_a_call_goes_on_where_the_last_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--seconds", "0") == 0
    assert "0 of 24 runs are there" in capsys.readouterr().out
    one = ("--forms", "dense", "--seeds", "0", "--lengths", "512")
    assert run(monkeypatch, tmp_path, *one) == 0
    (first,) = rows_of(tmp_path)
    assert first["accuracy"].keys() == KINDS.keys()
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    assert not list((tmp_path / "checkpoints").iterdir())
    more = ("--forms", "dense", "--seeds", "0", "1", "--lengths", "512")
    assert run(monkeypatch, tmp_path, *more) == 0
    rows = rows_of(tmp_path)
    assert rows[0] == first
    assert [(row["form"], row["length"], row["seed"]) for row in rows[1:]] == [("dense", 512, 1)]
    assert run(monkeypatch, tmp_path, *more, "--steps", "3") == 2
    assert "of other settings; choose another --out" in capsys.readouterr().err


def test_a_longer_length_goes_on_from_the_weights_of_the_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--forms", "dense", "--seeds", "0", "--lengths")
    loaded: list[dict[str, torch.Tensor]] = []

    def note(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> int:
        loaded.append({name: x.clone() for name, x in tensors.items()})
        return 0

    monkeypatch.setattr(
        "training.loop.Trainer._resume", lambda self: note(self, self.plain.state_dict())
    )
    assert run(monkeypatch, tmp_path, *one, "512", "1024") == 0
    short, long = rows_of(tmp_path)
    assert [short["goes_on_from"], long["goes_on_from"]] == [None, 512]
    weights = load_file(tmp_path / "weights" / "retrieval-dense-512-0.safetensors")
    assert all(torch.equal(loaded[1][name], weight) for name, weight in weights.items())
    assert not all(torch.equal(loaded[0][name], weight) for name, weight in weights.items())

    (tmp_path / "weights" / "retrieval-dense-512-0.safetensors").unlink()
    (tmp_path / "retrieval.json").write_text(json.dumps({"rows": [short]}))
    assert run(monkeypatch, tmp_path, *one, "512", "1024") == 2
    assert "goes on from the weights of ('dense', 512, 0)" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "new", *one, "1024") == 2
    assert "add 512 to --lengths" in capsys.readouterr().err


def test_a_model_is_asked_for_more_than_it_was_trained_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ("--forms", "dense", "infllm_v2", "--seeds", "0", "--lengths", "512")
    assert run(monkeypatch, tmp_path, *one) == 0
    dense, sparse = (row["harder"] for row in rows_of(tmp_path))
    assert dense.keys() == {"1024 tokens", CROWD}
    assert sparse.keys() == {*dense, "topk 8", "topk 4"}
    for found in (dense, sparse):
        assert found.pop(CROWD).keys() == {CROWD}
        assert all(accuracies.keys() == KINDS.keys() for accuracies in found.values())


def test_processes_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that another process wrote during a run stays."""
    add = runpy.run_path(str(SCRIPT))["add_row"]
    world = World(0, 1, CPU)
    for seed in range(3):
        add(tmp_path / "retrieval.json", {"seed": seed}, world)
    assert [row["seed"] for row in rows_of(tmp_path)] == [0, 1, 2]


def test_a_run_that_is_stopped_goes_on_from_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--forms", "dense", "--seeds", "0", "--lengths", "512", "--steps", "4")
    with monkeypatch.context() as slow:  # a second passes from each look at the clock to the next
        slow.setattr(time, "monotonic", itertools.count().__next__)
        assert run(slow, tmp_path / "stopped", *one, "--seconds", "3") == 0
    assert "0 of 1 runs are there" in capsys.readouterr().out
    (folder,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    for out in ("stopped", "unbroken"):
        assert run(monkeypatch, tmp_path / out, *one) == 0
    stopped, unbroken = (rows_of(tmp_path / out)[0] for out in ("stopped", "unbroken"))
    assert stopped | {"seconds": 0} == unbroken | {"seconds": 0}


def test_a_longer_length_that_would_take_too_long_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    one = ("--task", "retrieval", "--forms", "dense", "--seeds", "0", "--lengths", "512", "1024")
    assert run(monkeypatch, tmp_path, *one, "--steps", "40", "--run-seconds", "7") == 0
    out = capsys.readouterr().out
    assert "dense 512 0 about 40 s for 40 steps" in out
    assert "dense 1024 0 about 8 s for 8 steps" in out
    assert "dense 1024 0 left out: more than --run-seconds 7" in out
    assert "1 of 2 runs are there" in out


def test_without_matplotlib_a_run_has_no_figure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "training.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr("training.plot", raising=False)
    one = ("--forms", "dense", "--seeds", "0", "--lengths", "512")
    assert run(monkeypatch, tmp_path, *one) == 0
    assert "no figure: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "retrieval.png").exists()


def test_an_unknown_form_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--forms", "dense", "moba") == 2
    assert "a form must be one of nsa, dense, infllm_v2, msa; got 'moba'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_length_without_room_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--lengths", "512", "128") == 2
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
    assert "| single, % | 4096 | not run | 90.0 ± 10.0 (3) |" in shown
    assert "| single, % | 4096 | 80.0 (1) |" in table(rows[:1], ["dense"], [4096], measures)
    assert "| variables, % | 16384 | not run | not run |" in shown


def test_no_line_without_a_number_where_a_form_was_measured() -> None:
    row = {"form": "dense", "length": 65536, "seed": 0, "accuracy": {"single": 1.0}}
    shown = table([row], ["nsa", "dense"], [65536], MEASURES["retrieval"]).splitlines()[2:]
    assert shown == ["| single, % | 65536 | not run | 100.0 (1) |"]


def test_harder_questions_have_a_line_where_a_form_was_asked() -> None:
    accuracy = dict.fromkeys(KINDS, 0.9)
    harder = {"65536 tokens": {**accuracy, "single": 0.3}, CROWD: {CROWD: 0.5}}
    dense = {"form": "dense", "length": 16384, "seed": 0, "accuracy": accuracy, "harder": harder}
    lists = {"topk 8": dict.fromkeys(KINDS, 0.7)}
    nsa = {**dense, "form": "nsa", "harder": {**harder, **lists}}
    shown = table([dense, nsa], ["nsa", "dense"], [16384], HARDER).splitlines()[2:]
    assert shown == [
        "| as trained, % | 16384 | 90.0 (1) | 90.0 (1) |",
        "| 65536 tokens, % | 16384 | 80.0 (1) | 80.0 (1) |",
        "| topk 8, % | 16384 | 70.0 (1) | – |",
        f"| {CROWD}, % | 16384 | 50.0 (1) | 50.0 (1) |",
    ]
