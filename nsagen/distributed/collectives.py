"""Exchanges between the ranks of a group, started early and awaited late.

Each is started by one call and awaited by another, so that a GPU computes while data move. They are
methods of the group: PyTorch's functional collectives, which compiled code takes, cost the host
four times as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nsagen.core.errors import LostRankError

_OPS = torch.ops._c10d_functional

REPORT_SECONDS = 5.0
"""How long the ranks of a failed job wait for each other's sign of life."""


@dataclass(frozen=True)
class Exchange:
    """One that has begun: what it gives is complete when `wait` returns; on a GPU, its stream waits
    and not the host."""

    given: list[Tensor]
    work: dist.Work
    group: ProcessGroup

    def wait(self) -> list[Tensor]:
        _named(self.group, self.work.wait)
        return self.given


def start_gather(tensors: Sequence[Tensor], group: ProcessGroup) -> Exchange:
    """Begin to gather each tensor of all ranks, one after the other along dimension 0."""
    rows = [x.contiguous() for x in tensors]
    given = [x.new_empty(group.size() * x.shape[0], *x.shape[1:]) for x in rows]
    work = _named(group, group.allgather_into_tensor_coalesced, given, rows)
    return Exchange(given, work, group)


def start_reduce_scatter(tensors: Sequence[Tensor], group: ProcessGroup) -> Exchange:
    """Begin to sum each tensor over the ranks; each gets its part of dimension 0."""
    rows = [x.contiguous() for x in tensors]
    given = [x.new_empty(x.shape[0] // group.size(), *x.shape[1:]) for x in rows]
    work = _named(group, group.reduce_scatter_tensor_coalesced, given, rows)
    return Exchange(given, work, group)


def start_exchange(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup
) -> Exchange:
    """Begin to send rows of x to each rank and to receive theirs, by rank."""
    given, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
    work = _named(group, group.alltoall_base, given, x, receive, send)
    return Exchange([given], work, group)


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """x summed over the ranks, for each of them, also in compiled code."""
    reduce = _OPS.all_reduce.default
    started = _named(group, reduce, x.contiguous(), "sum", group.group_name)
    return _named(group, _OPS.wait_tensor.default, started)


def start_sum_in_place(x: Tensor, group: ProcessGroup) -> Exchange:
    """As `sum_over`, without another tensor and without waiting."""
    return Exchange([x], _named(group, group.allreduce, [x]), group)


def _named(group: ProcessGroup, exchange: Callable[..., Any], *args: Any) -> Any:
    """An exchange within `naming_lost_ranks`, which costs the host more until there is an error."""
    try:
        return exchange(*args)
    except RuntimeError as error:
        _name_lost(error, group)
        raise


@contextmanager
def naming_lost_ranks(group: ProcessGroup | None = None) -> Iterator[None]:
    """Replace a broken connection's error by one that names the ranks that are gone.

    A collective over gloo fails with the address of a connection. Every rank that sees this writes
    a sign of life to the group's store, and looks for the others'. With NCCL, PyTorch's watchdog
    ends the process after the group's timeout, before Python sees an error: its log names the
    operation, and torchrun the rank.

    Args:
        group: whose ranks to look for; None for all.

    Raises:
        LostRankError: names the ranks without a sign of life.
    """
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        _name_lost(error, group)
        raise


def _name_lost(error: RuntimeError, group: ProcessGroup | None) -> None:
    """Raise a LostRankError in place of a broken connection's, if ranks are gone."""
    if lost := _lost_ranks(group) if _is_connection(error) else []:
        names = ", ".join(map(str, lost))
        raise LostRankError(
            f"distributed: all ranks must reach every exchange; got no sign of life from rank "
            f"{names} of {dist.get_world_size()} within {REPORT_SECONDS:.0f} s of a failed one; "
            "look for that rank's own error above, then start the job again"
        ) from error


def _is_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    signs = ("connection", "timed out", "timeout", "gloo", "peer", "nccl", "socket")
    return any(sign in text for sign in signs)


def _lost_ranks(group: ProcessGroup | None) -> list[int]:
    """The ranks of a group that do not write to the job's store within `REPORT_SECONDS`."""
    if not dist.is_initialized():
        return []
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
    deadline = time.monotonic() + REPORT_SECONDS
    try:
        store.set(f"nsagen/alive/{me}", "1")
        missing = [rank for rank in ranks if rank != me]
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"nsagen/alive/{rank}"])]
            time.sleep(0.05)
    except RuntimeError:  # the store was the lost rank's
        return []
    return missing
