"""One process or many: where a process runs, and how a model is spread over processes.

The processes form a mesh: data x context x tensor. Those that share sequences ("cp") or heads
("tp") train on one share of a batch, and every other one ("dp") on its own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from nsagen.distributed import naming_lost_ranks, tensor_parallel

from .state import own_parts

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; alone without it.

    Attributes:
        tp, cp: processes that share heads, and sequences.
        mesh: "dp", "cp" and "tp"; None without the last two.
    """

    rank: int
    size: int
    device: torch.device
    tp: int = 1
    cp: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def shares(self) -> int:
        """Processes that have different tokens of a step, and average their gradients."""
        return self.size // self.tp

    @property
    def batches(self) -> int:
        """Groups of processes that have different sequences of a step."""
        return self.shares // self.cp

    @property
    def batch(self) -> int:
        """This process's group among them."""
        return self.rank // (self.cp * self.tp)

    def dimension(self, name: str) -> DeviceMesh:
        """One dimension of the mesh."""
        assert self.mesh is not None
        return self.mesh[name]

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the processes that have different tokens."""
        if self.shares > 1:
            dist.all_reduce(x, group=None if self.tp == 1 else self.of_shares().get_group())
        return x

    def of_shares(self) -> DeviceMesh:
        """The mesh of these."""
        assert self.mesh is not None
        return self.mesh["dp", "cp"]._flatten("shares")

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str | None = None, tp: int = 1, cp: int = 1) -> Iterator[World]:
    """Join the other processes, if there are any, and leave them at the end.

    Args:
        device: "cpu" or "cuda"; by default a GPU for each process where there is one.
        tp, cp: processes that share heads, and sequences; the others have other sequences.

    Raises:
        ValueError: there are not tp * cp processes, or a multiple.
        LostRankError: another process is gone.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if min(tp, cp) < 1 or size % (tp * cp):
        raise ValueError(
            f"the number of processes must be a multiple of --tp times --cp; got {size} and "
            f"{tp} * {cp}; start that many with torchrun --nproc-per-node"
        )
    here = torch.device(kind)
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    if size > 1:
        if kind == "cuda":  # NCCL would otherwise guess each process's GPU from its rank
            dist.init_process_group("nccl", device_id=here)
        else:
            dist.init_process_group("gloo")
    mesh = None
    if tp * cp > 1:
        shape, names = (size // (tp * cp), cp, tp), ("dp", "cp", "tp")
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    try:
        with naming_lost_ranks():
            yield World(rank, size, here, tp, cp, mesh)
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
    model: nn.Module, layers: list[nn.Module], world: World, parallel: Parallel | None
) -> nn.Module:
    """The model as each process calls it: with some of its heads under tp, and with all weights
    (ddp) or its share of them (fsdp).

    Raises:
        ValueError: ddp, which knows no spread heads, with tp.
    """
    kind = parallel or ("ddp" if world.tp == 1 else "fsdp")
    if world.tp > 1:
        if kind == "ddp":
            raise ValueError(
                "--tp needs parameters that --parallel fsdp can share; got ddp; leave it out"
            )
        tensor_parallel(model, world.dimension("tp"))
    if world.shares == 1:
        return model
    if kind == "ddp":
        # All have the same buffers. Gradients lie in the buckets that are summed: no copies.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = None if world.tp == 1 else world.of_shares()
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average gradients over the processes that have different tokens, in one exchange, where the
    model is not wrapped for that."""
    if world.shares == 1:
        return
    held = [p for p in parameters if p.grad is not None]
    joined = torch.cat([cast(Tensor, p.grad).flatten() for p in held])
    world.total(joined.div_(world.shares))
    for parameter, part in zip(held, joined.split([p.numel() for p in held]), strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale gradients so that all together have a norm of at most `limit`.

    PyTorch's own takes parameters of one mesh, and exchanges the norm of each. Here each process
    takes the norm of its own parts, and one number is summed for each dimension of a mesh.
    """
    held = [p for p in parameters if p.grad is not None]
    gradients = [cast(Tensor, p.grad) for p in held]
    by_ranks: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for gradient in gradients:
        by_ranks.setdefault(_split_over(gradient), []).append(gradient)
    if not any(by_ranks):
        clip_grad_norm_(held, limit)
        return
    squares = []
    for groups, some in by_ranks.items():
        square = get_total_norm(own_parts(some)).square()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    factor = (limit / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(own_parts(gradients), factor)  # pyright: ignore[reportPrivateImportUsage]


def _split_over(x: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups of processes that have different parts of a tensor."""
    if not isinstance(x, DTensor):
        return ()
    assert not any(place.is_partial() for place in x.placements), "a gradient that is not summed"
    mesh = x.device_mesh
    return tuple(mesh.get_group(i) for i, p in enumerate(x.placements) if not p.is_replicate())


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
