"""Compiling candidates ahead of their measurement, in processes that need no GPU.

What is compiled here is what a launch at the task's sizes finds in Triton's cache on disk, so
that the GPU waits for no compiler.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nsagen.codegen.fingerprint import source_fingerprint
from nsagen.codegen.target import Target, parse_target
from nsagen.codegen.template import kernel_name, render
from nsagen.errors import NsagenError
from nsagen.harness.sizes import Sizes
from nsagen.tune.outcome import Outcome
from nsagen.tune.task import Task
from nsagen.tune.worker import Worker
from nsagen.workload import Schedule, Workload

COMPILE_LIMIT_S = 90.0


class Compiler:
    """Runs in a worker: compiles one variant for every size that it will be launched with."""

    def is_broken_by(self, error: Exception) -> bool:
        return False

    def compile(
        self, path: Path, workload: Workload, target_name: str, all_sizes: Sequence[Sizes]
    ) -> list[dict[str, Any]]:
        """The resources of each kernel at the first sizes; the others only fill the cache."""
        from nsagen.codegen.compile import compile_launch, recorded_launches
        from nsagen.codegen.resources import read_resources

        target = parse_target(target_name)
        resources = []
        for sizes in all_sizes:
            for call in recorded_launches(path, workload, sizes):
                compiled = compile_launch(call, target, path.stem)
                if sizes == all_sizes[0]:
                    name = call.kernel.__name__
                    row = asdict(read_resources(name, compiled, target))
                    programs = 1
                    for extent in call.grid:
                        programs *= int(extent)
                    row |= {"programs": programs, "num_warps": compiled.metadata.num_warps}
                    row["num_stages"] = compiled.metadata.num_stages
                    resources.append(row)
        return resources


class CompilePool:
    """Compiles schedules in `jobs` worker processes.

    Args:
        folder: where kernel files are put.
        server: what runs in the workers; tests put another one there.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        jobs: int,
        server: str = "nsagen.tune.compiler:Compiler",
    ) -> None:
        self._folder = folder
        self.target = target
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="compile")
        self._server = server
        self._mine = threading.local()
        self._workers: list[Worker] = []
        self._open = True
        self._futures: dict[tuple[Task, Schedule], Future[Outcome]] = {}
        self._ragged: dict[tuple[Task, Schedule], Future[Outcome]] = {}

    def path_of(self, task: Task, schedule: Schedule) -> Path:
        """The kernel file of a schedule."""
        return self._folder / f"{kernel_name(task.workload, schedule)}.py"

    def start(self, task: Task, schedule: Schedule) -> None:
        """Begin to compile a schedule, unless that has been done.

        Its file is written here and not in the pool's threads: Python 3.11 cannot parse source
        in several threads at once.
        """
        key = (task, schedule)
        if key in self._futures:
            return
        try:
            fingerprint = self._write(task, schedule)
        except NsagenError as error:
            self._futures[key] = Future()
            self._futures[key].set_result(Outcome(reason=str(error)))
            return
        sizes = (task.timed, task.checked)
        job = self._threads.submit(self._compile, task, schedule, sizes, fingerprint)
        self._futures[key] = job

    def start_ragged(self, task: Task, schedule: Schedule) -> None:
        """Begin to compile a schedule that may win for the sizes of its last check, too."""
        key = (task, schedule)
        if key not in self._ragged:
            from nsagen.verify import sizes_for  # imports torch, which nothing needs before

            sizes = (sizes_for(task.workload),)
            self._ragged[key] = self._threads.submit(self._compile, task, schedule, sizes, "")

    def finish_ragged(self, task: Task, schedule: Schedule) -> str:
        """Wait for what `start_ragged` began; why it failed, or an empty text."""
        self.start_ragged(task, schedule)
        return self._ragged[task, schedule].result().reason

    def finish(self, task: Task, schedule: Schedule) -> Outcome:
        """Wait for a schedule: its resources without a time, or the reason why it cannot run."""
        self.start(task, schedule)
        return self._futures[task, schedule].result()

    def done(self, task: Task, schedule: Schedule) -> bool:
        """Whether `finish` would not wait."""
        future = self._futures.get((task, schedule))
        return future is not None and future.done()

    def close(self) -> None:
        """Drop what is waiting, and kill what is compiling."""
        self._open = False
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)

    def _compile(
        self, task: Task, schedule: Schedule, sizes: tuple[Sizes, ...], fingerprint: str
    ) -> Outcome:
        start = time.monotonic()
        path = self.path_of(task, schedule)
        reply = self._worker().ask(
            "compile", path, task.workload, str(self.target), sizes, limit_s=COMPILE_LIMIT_S
        )
        seconds = time.monotonic() - start
        reason = f"compile: {reply.reason}" if reply.reason else ""
        reason = reason or _too_much_shared_memory(reply.value, self.target)
        return Outcome(
            reason=reason,
            compile_s=seconds,
            kernels=tuple(reply.value or ()),
            fingerprint=fingerprint,
        )

    def _write(self, task: Task, schedule: Schedule) -> str:
        source = render(task.workload, schedule, header=f"# {task.workload}: {schedule}")
        self.path_of(task, schedule).write_text(source, encoding="utf-8")
        return source_fingerprint(source, kernel_name(task.workload, schedule))

    def _worker(self) -> Worker:
        """This thread's worker. It sees no GPU: there is nothing there for it."""
        if not self._open:
            raise RuntimeError("the pool is closed")
        worker = getattr(self._mine, "worker", None)
        if worker is None:
            hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": ""}
            worker = self._mine.worker = Worker(self._server, hidden)
            self._workers.append(worker)
        return worker


def _too_much_shared_memory(kernels: list[dict[str, Any]] | None, target: Target) -> str:
    """Why the binaries cannot be launched; spills and low occupancy are left to measurement."""
    limit = target.shared_memory
    over = [k["shared_bytes"] for k in kernels or () if k["shared_bytes"] > limit]
    return f"needs {max(over)} bytes of shared memory (limit {limit})" if over else ""
