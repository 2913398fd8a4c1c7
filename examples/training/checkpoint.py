"""Checkpoints: tensors in safetensors, everything else in JSON, complete or not there at all.

A checkpoint is written beside its place and renamed into it, which a crash cannot halve.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 2
"""Checkpoints that stay; older ones go."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run has after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and drop the oldest ones; one that is there already stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:08d}"
    if final.exists():
        return final
    for remains in folder.glob(".writing-*"):
        shutil.rmtree(remains)
    writing = folder / f".writing-{os.getpid()}"
    writing.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()},
        writing / "tensors.safetensors",
    )
    text = json.dumps({"step": checkpoint.step, **checkpoint.scalars})
    (writing / "scalars.json").write_text(text)
    for path in (*writing.iterdir(), writing):
        _flush(path)
    writing.rename(final)
    _flush(folder)
    for old in _steps(folder)[:-KEPT]:
        # Under its own name it could be left half there, and be taken for a whole one.
        shutil.rmtree(old.rename(writing))
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a folder, or None."""
    steps = _steps(folder)
    if not steps:
        return None
    scalars = json.loads((steps[-1] / "scalars.json").read_text())
    tensors = load_file(steps[-1] / "tensors.safetensors")
    return Checkpoint(scalars.pop("step"), tensors, scalars)


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _flush(path: Path) -> None:
    """Have the operating system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
