"""The training loop: steps of accumulated parts, validation, checkpoints, resuming."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from nsagen.distributed import context_parallel
from nsagen.model import ToyLlama, ToyNSALlama

from . import checkpoint, graphs, state
from .checkpoint import Checkpoint
from .config import Model, ModelKind, TrainConfig, as_dict
from .data import IGNORED, Packed, Split, Task
from .forms import attend_by_index, attend_in_blocks, index_losses
from .graphs import Graphed
from .parallel import (
    Parallel,
    World,
    average_gradients,
    clip_gradients,
    gradients_stay_local,
    spread,
)

_RECOMPUTED: dict[str, bool] = {"use_reentrant": False, "preserve_rng_state": False}
"""The models draw no random numbers, whose state a CUDA graph could not read."""


@dataclass(frozen=True)
class Validation:
    """Mean loss and accuracy of the scored tokens of the validation batches."""

    step: int
    loss: float
    accuracy: float


@dataclass
class History:
    """What a run measured.

    Attributes:
        losses: of each step, before its update.
        seconds: that `timed_steps` took: all but each process's first, which compiles kernels.
    """

    losses: list[float] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    seconds: float = 0.0
    timed_steps: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        return cls(**{**values, "validations": [Validation(**v) for v in values["validations"]]})


def build_model(kind: ModelKind, config: TrainConfig, device: torch.device) -> Model:
    """A model whose initial weights depend on the seed alone."""
    generator = torch.Generator().manual_seed(config.seed)
    if kind == "nsa":
        model: Model = ToyNSALlama(config.nsa_config(), generator=generator)
    else:
        model = ToyLlama(config.dense_config(), generator=generator)
        if kind == "infllm_v2":
            attend_in_blocks(model, config.infllm_v2_form())
        elif kind == "msa":
            attend_by_index(model, config, generator)
    if config.activation_checkpointing:
        for layer in model.model.layers:
            layer.forward = functools.partial(recompute, layer.forward, **_RECOMPUTED)
    return model.to(device, getattr(torch, config.dtype))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = max(1, config.steps - config.warmup_steps)
    cosine = math.cos(math.pi * (step - config.warmup_steps) / left)
    return config.learning_rate * (0.55 + 0.45 * cosine)


class Trainer:
    """One run of one model on one task; `run` picks up from the newest checkpoint.

    Args:
        kind: "nsa", "dense", "infllm_v2" or "msa".
        config: what the loss curve depends on.
        task: where batches come from.
        folder: of the checkpoints; None to keep none.
        world: this process among others.
        parallel: how weights are spread over processes; by default fsdp where heads are, too.
        graph: whether a step's gradients are computed by a CUDA graph; see `graphs`.

    Raises:
        ValueError: a batch's sequences, or the model's heads, cannot be shared out evenly; a graph
            cannot hold the steps.
    """

    def __init__(
        self,
        kind: ModelKind,
        config: TrainConfig,
        task: Task,
        folder: Path | None,
        world: World,
        parallel: Parallel | None = None,
        graph: bool = False,
    ) -> None:
        if graph:
            graphs.check(kind, world, parallel)
        if config.rows % (config.accumulate * world.batches):
            raise ValueError(
                "a step's sequences must be a multiple of accumulate * processes with their own; "
                f"got {config.rows} and {config.accumulate} * {world.batches}; raise batch_tokens"
            )
        if kind == "msa" and world.cp * world.tp > 1:
            raise ValueError(
                "msa trains whole sequences with all heads, for its index loss; got "
                f"--cp {world.cp} and --tp {world.tp}; leave both out"
            )
        self.kind: ModelKind = kind
        self.config, self.task = config, task
        self.folder, self.world = folder, world
        self.plain = build_model(kind, config, world.device)
        self.parameters = sum(p.numel() for p in self.plain.parameters())
        self.context = context_parallel(self.plain, world.dimension("cp")) if world.cp > 1 else None
        self.model = self.plain
        if not graph or world.tp > 1:
            self.model = spread(self.plain, list(self.plain.model.layers), world, parallel)
        self._graph = Graphed(self._pass, [*self.plain.parameters()]) if graph else None
        self.optimizer = state.make_optimizer(self.plain, config.learning_rate, config.weight_decay)
        self.history = History()
        self._pending: list[Tensor] = []
        self._started: tuple[float, int] | None = None

    def run(self, on_step: Callable[[int, History], None] = lambda step, history: None) -> History:
        """Train to the last step, or from the newest checkpoint to it.

        Args:
            on_step: called with the number of steps done: at first, and after each one.

        Raises:
            ValueError: the checkpoint belongs to another configuration.
        """
        first = self._resume()
        on_step(first, self.history)
        for step in range(first, self.config.steps):
            if step == first + 1:
                self._start_clock()
            self._pending.append(self.step(step))
            done = step + 1
            last = done == self.config.steps
            if done % 10 == 0:
                self._flush_losses()
            if last or done % self.config.eval_every == 0:
                self._stop_clock()
                self.history.validations.append(self.validate(done))
                self._start_clock()
            if last or done % self.config.save_every == 0:
                self.save(done)
            on_step(done, self.history)
        return self.history

    def save(self, step: int) -> None:
        """Write a checkpoint, from which `run` goes on after `step` steps."""
        self._stop_clock()
        self._save(step)
        self._start_clock()

    @torch.no_grad()
    def validate(self, step: int) -> Validation:
        """Mean loss and accuracy over the validation batches, the same at every call."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for index in range(self.config.eval_batches):
            for part in self._parts("validation", index)[0]:
                logits = self._logits(part)
                scored = part.targets != IGNORED
                right = (logits.argmax(-1) == part.targets)[scored]
                sums += torch.stack(
                    [self._loss(logits, part.targets).double(), right.sum(), scored.sum()]
                )
        self.model.train()
        loss, right, count = self.world.total(sums).tolist()
        return Validation(step, loss / count, right / count)

    def step(self, step: int) -> Tensor:
        """One update of the weights; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        total = (self._graph or self._pass)(*self._parts("train", step))
        clip_gradients(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.world.total(total)

    def _pass(self, parts: list[Packed], scored: int | Tensor) -> Tensor:
        """Forward and backward passes: this process's share of the loss, and all gradients."""
        total = torch.zeros((), device=self.world.device)
        for index, part in enumerate(parts):
            with gradients_stay_local(self.model, index + 1 < len(parts)):
                loss = self._loss(self._logits(part), part.targets) / scored
                learned = loss
                if index := index_losses(self.plain):
                    learned = loss + torch.stack(index).mean() / (len(parts) * self.world.batches)
                # Processes average their gradients, but each has its share of the sum.
                (learned * self.world.shares).backward()
            total += loss.detach()
        if self._graph:
            average_gradients(self.model.parameters(), self.world)
        return total

    def _parts(self, split: Split, index: int) -> tuple[list[Packed], int]:
        """This process's share of a batch, in parts; and the scored tokens of the whole batch."""
        ids, targets = self.task.batch(split, index, self.config.rows)
        share = len(ids) // (self.world.batches * self.config.accumulate)
        first = self.world.batch * share * self.config.accumulate
        starts = range(first, first + share * self.config.accumulate, share)
        where = (self.world.device, self.context)
        parts = [Packed.of(ids[at : at + share], targets[at : at + share], *where) for at in starts]
        return parts, int((targets != IGNORED).sum())

    def _logits(self, part: Packed) -> Tensor:
        device = self.world.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.amp):
            return self.model(part.input_ids, part.cu_seqlens)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over scored tokens."""
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def _start_clock(self) -> None:
        self._flush_losses()
        self._started = (time.perf_counter(), len(self.history.losses))

    def _stop_clock(self) -> None:
        self._flush_losses()
        if self._started:
            since, steps = self._started
            self.history.seconds += time.perf_counter() - since
            self.history.timed_steps += len(self.history.losses) - steps
        self._started = None

    def _flush_losses(self) -> None:
        """Read the losses from the device, all at once."""
        if self._pending:
            self.history.losses += torch.stack(self._pending).tolist()
            self._pending.clear()

    def _save(self, step: int) -> None:
        if self.folder is None:
            return
        tensors = state.collect(self.model, self.optimizer)
        if not self.world.is_first:
            return
        record = {"config": as_dict(self.config), "kind": self.kind, "task": self.task.describe()}
        record |= {"history": asdict(self.history)}
        checkpoint.save(self.folder, Checkpoint(step, tensors, record))

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the number of steps that it is after."""
        found = checkpoint.load_latest(self.folder) if self.folder else None
        if found is None:
            return 0
        self._check_same_run(found.scalars)
        state.restore(self.model, self.optimizer, found.tensors)
        self.history = History.from_dict(found.scalars["history"])
        return found.step

    def _check_same_run(self, scalars: dict[str, Any]) -> None:
        ours = {**as_dict(self.config), "kind": self.kind, "task": self.task.describe()}
        theirs = {**scalars["config"], "kind": scalars["kind"], "task": scalars["task"]}
        # How often a run is looked at or saved, and how it is cut, change no result.
        free = {"eval_every", "save_every", "accumulate", "activation_checkpointing"}
        wrong = [
            f"{name} {theirs.get(name)!r}, now {value!r}"
            for name, value in ours.items()
            if name not in free and theirs.get(name) != value
        ]
        if wrong:
            raise ValueError(
                f"{self.folder}: a checkpoint must be of the same run; it has {'; '.join(wrong)}; "
                "choose another --out, or start anew with --fresh"
            )
