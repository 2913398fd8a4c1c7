"""Training that is killed again and again ends with the losses of a run that nothing disturbed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from examples.training import checkpoint
from examples.training.checkpoint import Checkpoint
from examples.training.config import ModelKind, TrainConfig
from examples.training.data import RecallTask
from examples.training.loop import History, Trainer
from examples.training.parallel import World
from tests.faults.support import killed_after, killed_at
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(
    seq_len=48,
    batch_tokens=96,
    steps=40,
    warmup_steps=2,
    eval_every=7,
    eval_batches=1,
    save_every=1,
    hidden_size=32,
    intermediate_size=64,
    layers=1,
    topk=3,
)

CALLS = ("mkdir", "fsync", "rename", "unlink", "rmdir")
"""What a checkpoint does to the file system, but for the contents of its files."""


def train(folder: Path | None, kind: ModelKind = "nsa") -> History:
    task = RecallTask(CONFIG.seq_len, CONFIG.seed)
    return Trainer(kind, CONFIG, task, folder, World(0, 1, torch.device("cpu"))).run()


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_killed_every_50_ms(kind: ModelKind, tmp_path: Path) -> None:
    """Each run goes on from what the one before it saved, and has 50 ms more than that one."""
    unbroken = train(None, kind)  # first: a child that had to import something would take long
    reached = [0]
    for number in itertools.count(1):
        killed = killed_after(0.05 * number, lambda: train(tmp_path, kind))
        found = checkpoint.load_latest(tmp_path)
        reached.append(found.step if found else 0)
        if not killed:
            break
    assert reached == sorted(reached)
    assert len({*reached}) > 3  # it went on in the middle more than once
    assert reached[-1] == CONFIG.steps
    history = train(tmp_path, kind)  # all steps are done
    assert history.losses == unbroken.losses
    assert history.validations == unbroken.validations


def saved(folder: Path, step: int) -> None:
    tensors = {"x": torch.full((64,), float(step)), "y": torch.full((8, 8), float(step))}
    checkpoint.save(folder, Checkpoint(step, tensors, {"losses": [float(step)] * 3}))


def test_killed_at_each_call_of_a_checkpoint(tmp_path: Path) -> None:
    """The newest checkpoint is the one before or the new one, and every one that is there whole."""
    newest = set()
    for call in itertools.count():
        folder = tmp_path / str(call)
        for step in range(1, checkpoint.KEPT + 1):
            saved(folder, step)
        killed = killed_at(call, lambda folder=folder: saved(folder, 9), CALLS)
        found = checkpoint.load_latest(folder)
        assert found
        newest.add(found.step)
        for path in folder.glob("step-*"):
            assert {one.name for one in path.iterdir()} == {"scalars.json", "tensors.safetensors"}
        assert {*found.tensors["x"].tolist(), *found.tensors["y"].flatten().tolist()} == {
            found.step
        }
        assert found.scalars == {"losses": [float(found.step)] * 3}
        saved(folder, 10)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        if not killed:
            break
    assert newest == {checkpoint.KEPT, 9}
    assert call > 10
