"""The training example: tasks, checkpoints, resuming, and the loop's equivalences."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from examples.training import checkpoint, graphs, state
from examples.training.checkpoint import Checkpoint
from examples.training.config import PRESETS, ModelKind, TrainConfig, config_of
from examples.training.data import IGNORED, Corpus, Packed, RecallTask, Split, TextTask
from examples.training.loop import History, Trainer
from examples.training.parallel import Parallel, World, clip_gradients, join_world, spread
from tests.distributed.ranks import on_ranks
from tests.faults.support import exit_code, free_port, start_child
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, torch.device("cpu"))

TINY = TrainConfig(
    seq_len=48,
    batch_tokens=192,
    steps=12,
    warmup_steps=2,
    eval_every=6,
    eval_batches=1,
    save_every=3,
    hidden_size=32,
    intermediate_size=64,
    corpus_mib=1,
    topk=3,
    initializer_range=0.02,
    window_size=16,
)
"""Sequences of more blocks than are selected, 2 tokens of compression windows to each."""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.read(1 << 20)


def train(
    corpus: Corpus, config: TrainConfig, kind: ModelKind = "nsa", folder: Path | None = None
) -> History:
    task = TextTask(corpus, config.seq_len, config.seed)
    return Trainer(kind, config, task, folder, ALONE).run()


def watched(corpus: Corpus, config: TrainConfig) -> tuple[History, list[int]]:
    """A run, and the tokens of each call of its model in training."""
    trainer = Trainer("nsa", config, TextTask(corpus, config.seq_len, config.seed), None, ALONE)
    calls: list[int] = []

    def note(model: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if model.training:
            calls.append(len(args[0]))

    trainer.plain.register_forward_pre_hook(note)
    return trainer.run(), calls


@pytest.fixture(scope="module")
def unbroken(corpus: Corpus) -> tuple[History, list[int]]:
    """What `watched` gives of NSA in the tiny configuration: always the same."""
    return watched(corpus, TINY)


def command(config: TrainConfig, out: Path, *more: str) -> list[str]:
    """The command line of a run of NSA on text."""
    base = config_of("cpu", "text", {})
    changes = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(config).items()
        if value != getattr(base, name)
    ]
    script = str(ROOT / "examples" / "train_toy.py")
    options = ["--model=nsa", "--device=cpu", "--threads=1", f"--out={out}", *changes, *more]
    return [script, *options]


def started(arguments: list[str], errors: Path | None = None, **environ: object) -> int:
    """Start a command line in a fork of this process; its id.

    Args:
        errors: the file that gets what it writes to stderr.
    """
    import matplotlib.pyplot  # noqa: F401  # once, for all forks

    def main() -> object:
        if errors is not None:
            sys.stderr = errors.open("w", buffering=1)
        os.environ.update({name: str(value) for name, value in environ.items()})
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        try:
            return runpy.run_path(arguments[0])["main"]()
        except Exception:
            traceback.print_exc()  # as Python does at its end, which a fork does not reach
            raise

    return start_child(main)


def losses_in(out: Path) -> list[float]:
    return json.loads((out / "text.json").read_text())["runs"]["nsa"]["losses"]


def test_a_killed_run_goes_on_bit_for_bit(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=40)
    process = started(command(config, tmp_path))
    checkpoints = tmp_path / "checkpoints" / "text-nsa"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")):
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    assert not (tmp_path / "text.json").exists()
    resumed_from = checkpoint.load_latest(checkpoints)
    assert resumed_from
    assert 0 < resumed_from.step < config.steps
    assert exit_code(started(command(config, tmp_path))) == 0
    unbroken = train(corpus, config)
    last = checkpoint.load_latest(checkpoints)
    assert last
    assert last.step == config.steps
    assert last.scalars["history"]["losses"] == unbroken.losses
    assert losses_in(tmp_path) == [round(loss, 5) for loss in unbroken.losses]
    assert (tmp_path / "text.png").stat().st_size > 10_000


def test_it_learns(unbroken: tuple[History, list[int]]) -> None:
    history, _ = unbroken
    assert history.losses[0] == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)
    assert history.validations[-1].loss < history.losses[0] - 0.5


def test_accumulation_equals_the_larger_batch(
    corpus: Corpus, unbroken: tuple[History, list[int]]
) -> None:
    whole, whole_calls = unbroken
    parts, part_calls = watched(corpus, replace(TINY, accumulate=4))
    assert parts.losses == pytest.approx(whole.losses, abs=2e-5)
    assert ({*whole_calls}, {*part_calls}) == ({192}, {48})
    assert len(part_calls) == 4 * len(whole_calls)


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_activation_checkpointing_changes_no_loss(corpus: Corpus, kind: ModelKind) -> None:
    """And what a step keeps for its backward pass is less than half of it."""
    config = replace(TINY, layers=4, steps=4)
    kept, losses = {}, {}
    for again in (False, True):
        task = TextTask(corpus, config.seq_len, config.seed)
        changed = replace(config, activation_checkpointing=again)
        trainer = Trainer(kind, changed, task, None, ALONE)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        part = trainer._parts("train", 0)[0][0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer._logits(part)
        kept[again], losses[again] = sum(sizes), trainer.run().losses
    assert losses[True] == losses[False]
    assert kept[True] < kept[False] / 2


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_mixed_precision(
    corpus: Corpus, unbroken: tuple[History, list[int]], kind: ModelKind
) -> None:
    """Parameters and losses stay in float32, and the curve stays near."""
    config = replace(TINY, amp=True)
    task = TextTask(corpus, config.seq_len, config.seed)
    trainer = Trainer(kind, config, task, None, ALONE)
    mixed = trainer.run()
    assert {p.dtype for p in trainer.plain.parameters()} == {torch.float32}
    plain = unbroken[0] if kind == "nsa" else train(corpus, TINY, kind)
    assert mixed.losses != plain.losses
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_as_one_does(
    corpus: Corpus, unbroken: tuple[History, list[int]], parallel: str, tmp_path: Path
) -> None:
    """And go on from what one process saved, with accumulation."""
    train(corpus, TINY, folder=tmp_path / "checkpoints" / "text-nsa")
    newest, before = sorted((tmp_path / "checkpoints" / "text-nsa").iterdir(), reverse=True)
    assert (newest.name, before.name) == ("step-00000012", "step-00000009")
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    run = command(replace(TINY, accumulate=2), tmp_path, f"--parallel={parallel}")
    if parallel == "ddp":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        whole = [sys.executable, *launcher, *run]
        subprocess.run(whole, env=environment, stdout=subprocess.DEVNULL, check=True)
    else:  # as the launcher starts them, without three more imports of torch
        assert launched(run, 2) == [0, 0]
    assert losses_in(tmp_path) == pytest.approx(unbroken[0].losses, abs=2e-5)
    assert (tmp_path / "text.png").stat().st_size > 0  # no process ended before the first had drawn


def launched(arguments: list[str], count: int) -> list[int]:
    """Exit codes of processes, started as the launcher does, without its imports of torch."""
    world = world_of(count)
    ranks = [started(arguments, RANK=rank, LOCAL_RANK=rank, **world) for rank in range(count)]
    return [exit_code(rank) for rank in ranks]


def world_of(count: int) -> dict[str, object]:
    return {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


def test_a_killed_process_is_named_and_ends_the_others(tmp_path: Path) -> None:
    """They would wait 30 minutes for it; and another mesh could go on from the checkpoint."""
    run = command(replace(TINY, steps=4000, save_every=2, layers=1), tmp_path, "--cp=2")
    world = world_of(2)
    errors = [tmp_path / "stderr-0", tmp_path / "stderr-1"]
    first, second = (
        started(run, errors[rank], RANK=rank, LOCAL_RANK=rank, **world) for rank in range(2)
    )
    checkpoints, deadline = tmp_path / "checkpoints" / "text-nsa", time.monotonic() + 60
    while not list(checkpoints.glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(second, signal.SIGKILL)
    assert exit_code(second) == -signal.SIGKILL
    killed = time.monotonic()
    assert exit_code(first) not in (0, None)
    assert time.monotonic() - killed < 30
    assert "got no sign of life from rank 1 of 2 within 5 s" in errors[0].read_text()
    assert checkpoint.load_latest(checkpoints)


@pytest.mark.parametrize(
    ("first", "then", "count"),
    [(("--tp=2", "--cp=2"), ("--cp=2",), 4), (("--tp=2",), (), 1)],
    ids=["heads and sequences, then sequences and batches", "heads, then one process"],
)
def test_any_mesh_goes_on_from_another_s_checkpoint(
    corpus: Corpus, first: tuple[str, ...], then: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    """With the losses that one process has from its first step."""
    config = replace(TINY, steps=4, save_every=2, layers=1)
    expected = pytest.approx(train(corpus, config).losses, abs=3e-5)
    ranks = 2 ** len(first)
    assert launched(command(config, tmp_path, *first), ranks) == [0] * ranks
    assert losses_in(tmp_path) == expected
    newest = max((tmp_path / "checkpoints" / "text-nsa").iterdir())
    assert newest.name == "step-00000004"
    shutil.rmtree(newest)
    assert launched(command(config, tmp_path, *then), count) == [0] * count
    assert losses_in(tmp_path) == expected


def test_clipping_exchanges_one_number_and_updates_none(corpus: Corpus) -> None:
    """Under shared heads too, in whose mesh some parameters are and others are not."""
    limit, config = 0.01, replace(TINY, layers=1, clip_norm=0.01)
    task = TextTask(corpus, config.seq_len, config.seed)

    def gradients(world: World) -> tuple[Trainer, dict[str, Tensor]]:
        trainer = Trainer("nsa", config, task, None, world)
        for part in trainer._parts("train", 0)[0]:
            trainer._loss(trainer._logits(part), part.targets).backward()
        return trainer, {n: cast(Any, p.grad) for n, p in trainer.plain.named_parameters()}

    def whole(found: dict[str, Any]) -> dict[str, Tensor]:
        return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in found.items()}

    def run(rank: int) -> tuple[dict[str, Tensor], int, int]:
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
        trainer, found = gradients(World(rank, 2, torch.device("cpu"), 2, 1, mesh))
        with CommDebugMode() as clipping:
            clip_gradients(trainer.plain.parameters(), limit)
        trainer.optimizer.step()  # makes the state
        with CommDebugMode() as updating:
            trainer.optimizer.step()
        return whole(found), clipping.get_total_counts(), updating.get_total_counts()

    trainer, expected = gradients(ALONE)
    clip_gradients(trainer.plain.parameters(), limit)
    for found, clipping, updating in on_ranks(2, run):
        assert (clipping, updating) == (1, 0)
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            assert torch.allclose(found[name], one, rtol=1e-4, atol=1e-7), name


def test_fused_updates_of_spread_weights(
    corpus: Corpus,
    unbroken: tuple[History, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on GPUs: the losses are those of other updates, and go on from a checkpoint."""
    monkeypatch.setattr(state, "FUSED", ("cpu",))
    config, task = replace(TINY, steps=4), TextTask(corpus, TINY.seq_len, TINY.seed)

    def run(rank: int) -> list[float]:
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
        world = World(rank, 2, torch.device("cpu"), 2, 1, mesh)
        trainer = Trainer("nsa", config, task, tmp_path, world)
        assert trainer.optimizer.defaults["fused"]
        return trainer.run().losses

    for losses in on_ranks(2, run):
        assert losses == pytest.approx(unbroken[0].losses[:4], rel=1e-4)
    shutil.rmtree(tmp_path / "step-00000004")
    again = Trainer("nsa", config, task, tmp_path, ALONE).run()
    assert again.losses == pytest.approx(unbroken[0].losses[:4], rel=1e-4)


def test_meshes_that_do_not_fit() -> None:
    text = r"multiple of --tp times --cp; got 1 and 2 \* 3"
    with pytest.raises(ValueError, match=text), join_world("cpu", tp=2, cp=3):
        pass
    with pytest.raises(ValueError, match="--tp needs parameters that --parallel fsdp can share"):
        spread(torch.nn.Linear(2, 2), [], World(0, 2, torch.device("cpu"), tp=2), "ddp")


def test_nccl_is_told_which_gpu_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to guess, it takes the rank, which is another GPU on all machines but the first."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    joined: list[tuple[object, ...]] = []

    def init(backend: str, device_id: torch.device | None = None) -> None:
        joined.append((backend, device_id))

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.append((device,)))
    gpu = torch.device("cuda", 1)
    with join_world("cuda") as world:
        assert (world.rank, world.size, world.device) == (3, 4, gpu)
    assert joined == [(gpu,), ("nccl", gpu)]


def test_a_batch_depends_on_seed_and_step_alone(corpus: Corpus) -> None:
    task = TextTask(corpus, 48, seed=0)
    ids, targets = task.batch("train", 3, 4)
    assert torch.equal(task.batch("train", 3, 4)[0], ids)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    for other in (
        task.batch("train", 4, 4),
        task.batch("validation", 3, 4),
        TextTask(corpus, 48, seed=1).batch("train", 3, 4),
    ):
        assert not torch.equal(other[0], ids)


@pytest.mark.parametrize(("split", "index"), [("train", 0), ("train", 1), ("validation", 0)])
def test_recall_asks_for_what_lies_far_back(split: Split, index: int) -> None:
    task = RecallTask(2048, seed=0, easier_steps=1)
    assert task.length == 2
    ids, targets = task.batch(split, index, 8)
    copies = set()
    for row_ids, row_targets in zip(ids.tolist(), targets.tolist(), strict=True):
        body, asked = row_ids[: -2048 // 4], row_ids[-2048 // 4 :]
        places = [place for place, token in enumerate(body) if token < 64]
        assert min(places) >= 2048 // 16
        assert max(places) < 2048 // 2
        assert all(body[at] == body[at + 1] for at in places[::2])  # two tokens in a row
        needles = Counter(body[at] for at in places[::2])
        assert sorted(token // task.values for token in needles) == list(range(task.classes))
        assert len(set(needles.values())) == 1
        copies.update(needles.values())
        assert not any(64 <= token < 72 for token in body)
        answer = {64 + token // task.values: token for token in needles}
        assert {*asked} == {*answer}
        assert row_targets == [IGNORED] * len(body) + [answer[token] for token in asked]
    easier = split == "train" and index < task.easier_steps
    assert 1 in copies
    assert (max(copies) > 8) == easier
    assert easier or copies == {1}


@pytest.mark.parametrize("preset", PRESETS)
def test_only_what_attention_selects_or_compresses_reaches_an_answer(preset: str) -> None:
    """Neither the windows of all layers one after the other nor the first blocks do."""
    config = config_of(preset, "recall", {})
    task = RecallTask(config.seq_len, config.seed)
    assert config.layers * (config.window_size - 1) < task.least_distance
    assert config.nsa_config().init_blocks * config.block_size <= task.first
    _, targets = task.batch("validation", 0, 1)
    first_question = int((targets[0] != IGNORED).nonzero()[0])
    assert first_question - (task.last - 1) == task.least_distance


def test_recall_needs_room() -> None:
    RecallTask(36, seed=0)
    with pytest.raises(ValueError, match=r"recall needs room for 8 values .* got seq_len=35"):
        RecallTask(35, seed=0)


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path) is None
    (tmp_path / ".writing-1").mkdir()
    (tmp_path / ".writing-1" / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.load_latest(tmp_path) is None
    for step in (1, 2, 10):
        tensors = {"x": torch.arange(6.0).view(2, 3).T * step}
        checkpoint.save(tmp_path, Checkpoint(step, tensors, {"losses": [0.1 + 0.2]}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    found = checkpoint.load_latest(tmp_path)
    assert found
    assert found.step == 10
    assert torch.equal(found.tensors["x"], torch.arange(6.0).view(2, 3).T * 10)
    assert found.scalars == {"losses": [0.1 + 0.2]}


def test_a_checkpoint_of_another_run_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=3)
    train(corpus, config, folder=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate 0.003, now 0.1; choose another --out"):
        train(corpus, replace(config, learning_rate=0.1), folder=tmp_path)
    again = train(corpus, replace(config, accumulate=2), folder=tmp_path)  # all steps are done
    assert len(again.losses) == 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seq_len": 100}, "batch_tokens must be a multiple of seq_len"),
        ({"batch": 1}, "a run has no batch; it has accumulate"),
    ],
)
def test_wrong_settings(changes: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        config_of("cpu", "text", changes)


def test_more_parts_than_sequences(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="multiple of accumulate"):
        Trainer("nsa", TINY, TextTask(corpus, 48, 0), None, World(0, 3, torch.device("cpu")))


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's stand-in computes again, and writes to the same places."""

    def record(call: Callable[[], list[Tensor]]) -> graphs.Recorded:
        results = [x.clone() for x in call()]

        def replay() -> None:
            for mine, new in zip(results, call(), strict=True):
                mine.copy_(new)

        return results, replay

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))


def test_graphs_give_the_same_losses(
    corpus: Corpus, unbroken: tuple[History, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's batch goes to where the graph reads it, and its gradients to the update."""
    on_a_cpu(monkeypatch)
    config = replace(TINY, steps=4)
    task = TextTask(corpus, config.seq_len, config.seed)
    found = Trainer("nsa", config, task, None, ALONE, graph=True).run().losses
    assert found == unbroken[0].losses[: len(found)]


def test_ranks_with_graphs_give_the_same_losses(
    corpus: Corpus, unbroken: tuple[History, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu(monkeypatch)
    config = replace(TINY, steps=3)

    def run(rank: int) -> list[float]:
        mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp", "cp", "tp"))
        world = World(rank, 2, torch.device("cpu"), 1, 2, mesh)
        task = TextTask(corpus, config.seq_len, config.seed)
        return Trainer("nsa", config, task, None, world, graph=True).run().losses

    for losses in on_ranks(2, run):
        assert losses == pytest.approx(unbroken[0].losses[:3], rel=1e-5)


def test_batches_that_a_graph_does_not_fit_run_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_cpu(monkeypatch)
    weight = torch.nn.Parameter(torch.ones(()))

    def compute(parts: list[Packed], scored: Tensor) -> Tensor:
        loss = weight * parts[0].input_ids.sum() / scored
        loss.backward()
        return loss.detach()

    graphed = graphs.Graphed(compute, [weight])
    for numbers, calls in (([[1, 2]], 0), ([[3, 4]], 0), ([[5, 6, 7]], 1), ([[8, 9, 10]], 1)):
        ids = torch.tensor(numbers)
        weight.grad = None
        loss = graphed([Packed.of(ids, ids, torch.device("cpu"))], 2)
        assert weight.grad is not None
        assert float(loss) == float(weight.grad) == float(ids.sum()) / 2
        assert len(caplog.records) == calls, "it is said once"
    assert "--graph: a batch of other lengths" in caplog.text


def test_a_graph_is_refused_before_any_model_trains(tmp_path: Path) -> None:
    """Also for the second of two models."""
    errors = tmp_path / "stderr"
    assert exit_code(started(command(TINY, tmp_path, "--graph", "--model=both"), errors)) == 2
    assert "train_toy.py: --graph needs a GPU; got cpu; leave it out" in errors.read_text()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("kind", "world", "parallel", "text"),
    [
        ("nsa", ALONE, None, "--graph needs a GPU; got cpu; leave it out"),
        ("dense", World(0, 1, torch.device("cuda")), None, "read lengths on the host; got dense"),
        ("nsa", World(0, 2, torch.device("cuda")), "fsdp", "takes whole weights; got fsdp"),
        ("nsa", World(0, 4, torch.device("cuda"), tp=2), None, "got fsdp, --tp 2 and 4 processes"),
    ],
)
def test_steps_that_no_graph_can_hold(
    corpus: Corpus, kind: ModelKind, world: World, parallel: Parallel | None, text: str
) -> None:
    task = TextTask(corpus, TINY.seq_len, TINY.seed)
    with pytest.raises(ValueError, match=text):
        Trainer(kind, TINY, task, None, world, parallel, graph=True)
