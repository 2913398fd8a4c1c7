"""Groups of processes over gloo: forks of the test, which has imported torch already."""

from __future__ import annotations

import datetime
import faulthandler
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from tests.faults.support import start_child

Result = TypeVar("Result")

LIMIT = 60.0
"""Seconds that a group may take; a test whose ranks hang fails then."""


def on_ranks(
    count: int, work: Callable[[int], Result], timeout: float = 30.0, lost: tuple[int, ...] = ()
) -> list[Result]:
    """What `work(rank)` returns in each of `count` processes that form the default group.

    Args:
        timeout: of a collective, in seconds.
        lost: ranks that are expected to die; their results are None.

    Raises:
        AssertionError: a rank failed, with its traceback, was ended by a signal, with the place
            where it was, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        children = {
            start_child(lambda rank=rank: _run(rank, count, work, place, timeout)): rank
            for rank in range(count)
        }
        deadline, failed = time.monotonic() + LIMIT, list[str]()
        try:
            while children and time.monotonic() < deadline:
                for child in [*children]:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    if not ended:
                        continue
                    rank, code = children.pop(child), os.waitstatus_to_exitcode(status)
                    if code < 0 and rank not in lost:
                        fault = place / f"fault-{rank}"
                        where = fault.read_text() if fault.exists() else "as it began"
                        failed.append(f"rank {rank} was ended by signal {-code}\n{where}")
                time.sleep(0.005)
            assert not children, f"rank {', '.join(map(str, children.values()))} hangs"
        finally:
            for child in children:
                os.kill(child, 9)
                os.waitpid(child, 0)
        failed += [path.read_text() for path in sorted(place.glob("error-*"))]
        assert not failed, "\n".join(failed)
        return [
            None if rank in lost else torch.load(place / f"result-{rank}", weights_only=False)
            for rank in range(count)
        ]  # type: ignore[return-value]


def _run(rank: int, count: int, work: Callable[[int], object], place: Path, timeout: float) -> None:
    with (place / f"fault-{rank}").open("w") as file:
        faulthandler.enable(file)
        _join(rank, count, work, place, timeout)


def _join(
    rank: int, count: int, work: Callable[[int], object], place: Path, timeout: float
) -> None:
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(place / "store"), count),
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.save(work(rank), place / f"result-{rank}")
        dist.barrier()
    except BaseException:
        (place / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
