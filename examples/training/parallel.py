"""One process or many: where a process runs, and how a model is spread over processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; alone without it."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Join the other processes, if there are any, and leave them at the end.

    Args:
        device: "cpu" or "cuda"; by default a GPU for each process where there is one.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    here = torch.device(kind)
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    if size > 1:
        if kind == "cuda":  # NCCL would otherwise guess each process's GPU from its rank
            dist.init_process_group("nccl", device_id=here)
        else:
            dist.init_process_group("gloo")
    try:
        yield World(rank, size, here)
    except BaseException:
        if size > 1:  # the others may never come: do not wait for them
            dist.destroy_process_group()
        raise
    if size > 1:
        # Leave together: a process that had nothing to write left early, and about one in 25 of
        # those aborted while it ended; torchrun then stopped the first one before its figure.
        dist.barrier()
        gc.collect()  # models, so that what they hold of the groups goes before the groups do
        dist.destroy_process_group()


def spread(
    model: nn.Module, layers: list[nn.Module], world: World, parallel: Parallel
) -> nn.Module:
    """The model as each process calls it: with all weights (ddp), or its share of them (fsdp)."""
    if world.size == 1:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


@contextmanager
def gradients_stay_local(model: nn.Module, while_: bool) -> Iterator[None]:
    """Leave the exchange of gradients to a later part of the step, if `while_`."""
    if isinstance(model, FSDPModule):
        cast(FSDPModule, model).set_requires_gradient_sync(not while_)
        yield
        return
    quiet = while_ and isinstance(model, DistributedDataParallel)
    with cast(DistributedDataParallel, model).no_sync() if quiet else nullcontext():
        yield
