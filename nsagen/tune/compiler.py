"""Compiles candidates before they are measured, in processes that need no GPU.

A launch at the task's sizes finds what is compiled here in Triton's cache on disk, so the GPU
never waits for a compiler.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsagen.cases.sizes import Sizes
from nsagen.codegen.fingerprint import source_fingerprint
from nsagen.codegen.template import kernel_name, render, rendered
from nsagen.core.compiler_cache import compiler_cache
from nsagen.core.errors import NsagenError, TuneError
from nsagen.core.files import replace_file
from nsagen.core.target import Target, parse_target
from nsagen.core.worker import Reply, Worker, WorkerPool
from nsagen.core.workload import Schedule, Workload
from nsagen.tune.outcome import Outcome
from nsagen.tune.task import Task

COMPILE_LIMIT_S = 90.0

FIRST = 2
"""Schedules of a task that are also compiled for its small sizes before any is about to win."""


@dataclass(frozen=True)
class Compiled:
    """What a worker reports about a schedule.

    Attributes:
        kernels: resources of each kernel, as `Resources` fields, and its launch.
        identity: equal for schedules that are the same; see `nsagen.tune.identity`.
        fingerprint: of the source; see `nsagen.codegen.fingerprint`.
    """

    kernels: tuple[dict[str, Any], ...]
    identity: str
    fingerprint: str


class Compiler:
    """Runs in a worker: renders and compiles one variant for every size of its launches."""

    def __init__(self) -> None:
        import nsagen.aot.compile  # noqa: F401  # takes seconds: while others still start

        os.nice(5)  # the process that measures must never wait for a core

    def is_broken_by(self, error: Exception) -> bool:
        return False

    def compile(
        self,
        path: Path,
        workload: Workload,
        schedule: Schedule,
        target_name: str,
        all_sizes: Sequence[Sizes],
    ) -> Compiled:
        """Write and compile the kernel file. The first sizes count; others fill the cache."""
        target = parse_target(target_name)
        source = render(workload, schedule, header=f"# {workload}: {schedule}")
        # A measurement may be reading it: tasks that differ only in sizes share the file.
        replace_file(path, source)
        found = self._compile(path, workload, target, all_sizes[0])
        for sizes in all_sizes[1:]:
            self._fill_cache(path, workload, target, sizes)
        return found

    def _compile(self, path: Path, workload: Workload, target: Target, sizes: Sizes) -> Compiled:
        from nsagen.aot.compile import all_launches, compile_launch
        from nsagen.aot.resources import read_resources
        from nsagen.tune.identity import HostCalls, identity_of

        case = _meta_case(workload, sizes)
        with HostCalls() as host:
            calls = all_launches(path, case)
        compiled = [compile_launch(call, target, path.stem) for call in calls]
        rows: dict[str, dict[str, Any]] = {}
        for call, kernel in zip(calls, compiled, strict=True):
            name = call.kernel.__name__
            if name not in rows:
                rows[name] = asdict(read_resources(name, kernel, target)) | {
                    "programs": math.prod(int(extent) for extent in call.grid),
                    "num_warps": kernel.metadata.num_warps,
                    "num_stages": kernel.metadata.num_stages,
                }
        identity = identity_of(path.stem, calls, compiled, host.noted)
        fingerprint = source_fingerprint(path.read_text(encoding="utf-8"), path.stem)
        return Compiled(tuple(rows.values()), identity, fingerprint)

    def _fill_cache(self, path: Path, workload: Workload, target: Target, sizes: Sizes) -> None:
        from nsagen.aot.compile import all_launches, compile_launch, first_calls

        for call in first_calls(all_launches(path, _meta_case(workload, sizes))):
            compile_launch(call, target, path.stem)


@functools.lru_cache(maxsize=16)
def _meta_case(workload: Workload, sizes: Sizes) -> Any:
    """A case without data: half a second for long sequences, and the same for every schedule."""
    from nsagen.cases.base import cases_of

    return cases_of(workload).make_case(workload, sizes, "meta")


def check_system(reply: Reply) -> None:
    """Refuse an answer that is about files and not about the schedule: no study may keep it.

    Raises:
        TuneError: names Triton's cache, which most files of a worker are in.
    """
    if reply.of_system:
        raise TuneError(
            f"tune: its workers must be able to write files, as into Triton's cache, "
            f"{compiler_cache()}; got {reply.reason}; make room, or set TRITON_CACHE_DIR and "
            "TMPDIR to folders that can be written; the same command goes on from here"
        )


class CompilePool:
    """Compiles schedules in worker processes.

    Args:
        folder: where kernel files are written.
        workers: processes that compile; see `nsagen.core.worker.compile_workers`.
        first: schedules of a task that are also compiled for its small sizes.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        workers: Sequence[Worker],
        first: int = FIRST,
    ) -> None:
        self._folder = folder
        self.target = target
        self._pool = WorkerPool(workers)
        self._first = first
        self._futures: dict[tuple[Task, Schedule], Future[Outcome]] = {}
        self._last: dict[tuple[Task, Schedule], Future[Outcome]] = {}
        self._begun: Counter[Task] = Counter()

    def path_of(self, task: Task, schedule: Schedule) -> Path:
        """The kernel file of a schedule."""
        return self._folder / f"{kernel_name(task.workload, schedule)}.py"

    def start(self, task: Task, schedule: Schedule) -> None:
        """Start to compile a schedule, unless it was started before."""
        key = (task, schedule)
        if key not in self._futures:
            # The first to run is compared with the reference, and all others with the first.
            few = self._begun[task] < self._first
            self._begun[task] += 1
            sizes = (task.timed, task.checked) if few else (task.timed,)
            self._futures[key] = self._submit(task, schedule, sizes)

    def start_last(self, task: Task, schedule: Schedule) -> None:
        """Start to compile a schedule that is about to win, for the sizes of its last check."""
        key = (task, schedule)
        if key not in self._last:
            from nsagen.cases.sizes import sizes_for

            sizes = (sizes_for(task.workload, task.timed.topk), task.checked)
            self._last[key] = self._submit(task, schedule, sizes)

    def last_done(self, task: Task, schedule: Schedule) -> bool:
        """Whether `finish_last` would not wait."""
        future = self._last.get((task, schedule))
        return future is not None and future.done()

    def finish_last(self, task: Task, schedule: Schedule) -> str:
        """Wait for what `start_last` started; returns why it failed, or an empty text."""
        self.start_last(task, schedule)
        return self._last[task, schedule].result().reason

    def finish(self, task: Task, schedule: Schedule) -> Outcome:
        """Wait for a schedule: its resources without a time, or the reason why it cannot run."""
        self.start(task, schedule)
        return self._futures[task, schedule].result()

    def done(self, task: Task, schedule: Schedule) -> bool:
        """Whether `finish` would not wait."""
        future = self._futures.get((task, schedule))
        return future is not None and future.done()

    def close(self) -> None:
        """Drop what is waiting and kill what is compiling."""
        self._pool.close()

    def _submit(self, task: Task, schedule: Schedule, sizes: tuple[Sizes, ...]) -> Future[Outcome]:
        return self._pool.submit(lambda worker: self._compile(worker, task, schedule, sizes))

    def _compile(
        self, worker: Worker, task: Task, schedule: Schedule, sizes: tuple[Sizes, ...]
    ) -> Outcome:
        start = time.monotonic()
        try:
            kernel = rendered(task.workload, schedule)
        except NsagenError as error:
            return Outcome(reason=f"compile: {error}")
        reply = worker.ask(
            "compile",
            self._folder / f"{kernel.name}.py",
            task.workload,
            schedule,
            str(self.target),
            sizes,
            limit_s=COMPILE_LIMIT_S,
        )
        seconds = time.monotonic() - start
        check_system(reply)
        if reply.reason:
            return Outcome(
                reason=f"compile: {reply.reason}",
                compile_s=seconds,
                fingerprint=kernel.fingerprint,
            )
        compiled: Compiled = reply.value
        return Outcome(
            reason=_too_much_shared_memory(compiled.kernels, self.target),
            compile_s=seconds,
            kernels=compiled.kernels,
            fingerprint=compiled.fingerprint,
            identity=compiled.identity,
        )


def _too_much_shared_memory(kernels: Sequence[dict[str, Any]], target: Target) -> str:
    """Why the binaries cannot be launched; measurement judges spills and low occupancy."""
    limit = target.shared_memory
    over = [k["shared_bytes"] for k in kernels if k["shared_bytes"] > limit]
    return f"needs {max(over)} bytes of shared memory (limit {limit})" if over else ""
