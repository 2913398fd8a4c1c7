"""Worker processes that may crash, hang or be killed without harming the command that uses them.

A worker makes one `Server` object and calls its methods as asked, one at a time. It is
replaced when it dies, when an answer is late, and when the server reports that an error has made
it unusable (after an illegal memory access every later CUDA call of a process fails).

A worker and the programs that it starts are one process group. The group ends when the worker
is closed, or when the process that made it ends in any way.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, TypeVar

from nsagen.core.compiler import IN_ITS_PLACE
from nsagen.core.errors import WorkerError

T = TypeVar("T")

_log = logging.getLogger("nsagen.worker")

START_S = 180.0
"""Seconds that a worker may take to import what it needs and answer for the first time."""

_CLOSED = "crash: the worker was closed"

_NOT_INHERITED = (
    *IN_ITS_PLACE,
    "PYTHONPATH",
    "PYTHONINSPECT",
    "PYTHONSAFEPATH",
    "PYTHONWARNINGS",
)
"""Variables that are right for the parent but would change what a worker does."""

# Started with -P, so that no file of the working folder is imported in place of a module.
_MAIN = """
import json, sys
given = json.loads(sys.argv[1])
sys.path.insert(0, given["root"])
import nsagen
sys.path[:] = given["path"]
from nsagen.core.worker import main
main(given["server"], given["connection"], given["lifeline"])
"""


class Server(Protocol):
    """What runs in a worker. Its other methods are what the worker can be asked for."""

    def is_broken_by(self, error: Exception) -> bool:
        """Whether this process can no longer be trusted after the error."""
        ...


@dataclass(frozen=True)
class Reply:
    """A worker's answer: a value, or the reason why it has no value.

    Attributes:
        of_system: whether the reason is a file or the system, not what was asked for.
    """

    value: Any = None
    reason: str = ""
    broken: bool = False
    of_system: bool = False


class Worker:
    """A process that answers requests, restarted whenever one has killed it.

    Args:
        server: the class to make in it, as "module:class".
        environment: variables to set in it.

    Make it and first ask it in a thread that lives as long as it is needed: Linux treats the
    end of the thread that started a process as the end of its parent.
    """

    def __init__(self, server: str, environment: Mapping[str, str] | None = None) -> None:
        self._server = server
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lifeline: int | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the worker
        self._ready = False
        self._over = False
        self._lock = threading.Lock()
        self.starts = 0

    @property
    def alive(self) -> bool:
        """Whether the process that answered last still runs, with its state in memory."""
        return self._process is not None and self._process.poll() is None

    def ask(self, method: str, *args: Any, limit_s: float) -> Reply:
        """Call a method of the server.

        Returns:
            its value; or the reason why not: its exception, or that the process died, or that it
            was killed for not answering within `limit_s`.

        Raises:
            WorkerError: a fresh worker cannot be started.
        """
        if not self.alive:
            self.spawn()
        if not self._ready:
            self._await()
        connection = self._connection
        if connection is None:
            return Reply(reason=_CLOSED)
        try:
            connection.send((method, args))
            if not connection.poll(limit_s):
                self._kill()
                return Reply(reason=f"hang: no answer in {limit_s:.0f} s")
            reply: Reply = connection.recv()
        except (EOFError, OSError):
            return Reply(reason=self._obituary())
        except BaseException:  # Ctrl-C: the process cannot be trusted to finish its work
            self._kill()
            raise
        if reply.broken:
            self._kill()
        return reply

    def close(self) -> None:
        """End the worker for good: kill its process and those that it started."""
        with self._lock:
            self._over = True
        self._kill()
        self._errors.close()

    def _kill(self) -> None:
        with self._lock:  # another thread may be closing it too
            connection, self._connection = self._connection, None
            process, self._process = self._process, None
            lifeline, self._lifeline = self._lifeline, None
        if connection is not None:
            connection.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        if lifeline is not None:
            os.close(lifeline)

    def spawn(self) -> None:
        """Start the process in the background; the first request waits for it."""
        self._kill()
        with self._lock:
            if self._over:
                raise WorkerError(
                    f"worker {self._server}: must be open; it was closed; make another"
                )
            self._start()

    def _start(self) -> None:
        self.starts += 1
        self._ready = False
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        self._errors.seek(0)
        self._errors.truncate()
        given = {
            "root": str(Path(__file__).resolve().parents[2]),
            "path": _search_path(),
            "server": self._server,
            "connection": theirs.fileno(),
            "lifeline": lifeline,
        }
        inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        _note_unseen(tuple(name for name in IN_ITS_PLACE[1:] if os.environ.get(name)))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, json.dumps(given)],
                env=inherited | self._environment,
                pass_fds=[theirs.fileno(), lifeline],
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
            )
        except OSError as error:
            ours.close()
            raise WorkerError(
                f"worker {self._server}: must start as a process; got {error}; see nsagen doctor"
            ) from error
        finally:
            theirs.close()
            os.close(lifeline)
        self._connection = Connection(ours.detach())

    def _await(self) -> None:
        connection = self._connection
        try:
            if connection and connection.poll(START_S) and connection.recv().value == "ready":
                self._ready = True
                return
        except (EOFError, OSError):
            pass
        text = self._obituary()
        raise WorkerError(f"worker {self._server}: must start; {text}; see nsagen doctor")

    def _obituary(self) -> str:
        """How the process ended, and its last output."""
        process = self._process
        if process is None:  # another thread has closed the worker
            return _CLOSED
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        self._kill()
        how = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"signal {signal.Signals(-code).name}"
        if self._errors.closed:
            return _CLOSED
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"crash: {how}" + (f": {said[-1][:200]}" if said else "")


def serve(server: Server, connection: Connection) -> None:
    """Answer requests until the other side is gone."""
    connection.send(Reply("ready"))
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            reply = Reply(getattr(server, method)(*args))
        except Exception as error:  # any error concerns only this request
            lines = str(error).strip().splitlines() or ["no message"]
            reason = f"{type(error).__name__}: {lines[0][:200]}"
            of_system = isinstance(error, OSError)
            reply = Reply(None, reason, server.is_broken_by(error), of_system)
        connection.send(reply)


class WorkerPool:
    """Workers that share a queue of calls; leaving the `with` block cancels what has not started.

    Args:
        workers: all of one server.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = tuple(workers)
        self._threads = ThreadPoolExecutor(len(workers), thread_name_prefix="worker")
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            self._idle.put(worker)

    def submit(self, call: Callable[[Worker], T]) -> Future[T]:
        """Have the next free worker make a call."""
        return self._threads.submit(self._call, call)

    def _call(self, call: Callable[[Worker], T]) -> T:
        worker = self._idle.get()
        try:
            return call(worker)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Drop waiting calls and kill running ones."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Caller:
    """A server for functions that a module has by name."""

    def is_broken_by(self, error: Exception) -> bool:
        return False

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def map_in_workers(
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int, limit_s: float
) -> Generator[T, None, None]:
    """A function's results for several tuples of arguments, in their order, from processes.

    Close the iterator to cancel what has not started and kill what is running.

    Args:
        function: of a module, by whose name a process finds it.
        limit_s: seconds that one call may take.

    Raises:
        WorkerError: a call raised, its process died, or it took too long; the text says which.
    """
    workers = compile_workers(max(1, min(jobs, len(calls))), "nsagen.core.worker:Caller")
    with WorkerPool(workers) as pool:

        def ask(arguments: tuple[Any, ...]) -> Future[Reply]:
            return pool.submit(lambda w: w.ask("call", function, *arguments, limit_s=limit_s))

        for arguments, future in [(call, ask(call)) for call in calls]:
            reply = future.result()
            if reply.reason:
                shown = ", ".join(map(str, arguments))
                raise WorkerError(f"{function.__name__}({shown}): must succeed; {reply.reason}")
            yield reply.value


def compile_workers(count: int, server: str) -> list[Worker]:
    """Workers that start now. They see no GPU because they need none."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    workers = [Worker(server, hidden) for _ in range(count)]
    for worker in workers:
        worker.spawn()
    return workers


@functools.cache
def _note_unseen(names: tuple[str, ...]) -> None:
    """Say once which of the user's settings have no effect; the interpreter concerns only runs."""
    if names:
        _log.warning(
            "%s: not for nsagen's workers, which compile the kernel and target that they are given",
            ", ".join(names),
        )


def _search_path() -> list[str]:
    """Where a worker looks for modules: where this process does, in a safe order.

    The standard library goes first and the working folder last, where it can supply a caller's own
    modules but hides nothing.
    """
    library = os.path.dirname(os.__file__)
    standard = (library, os.path.join(library, "lib-dynload"))
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        here = ""
    entries = dict.fromkeys(os.path.join(here, entry) for entry in sys.path)

    def rank(entry: str) -> int:
        if os.path.realpath(entry) == os.path.realpath(here):
            return 2
        return 0 if entry in standard else 1

    return sorted(filter(None, entries), key=rank)


def _die_with_parent(lifeline: int) -> None:
    """End this process group when the other end of a pipe closes: the parent is gone.

    Linux does so itself, even if this process hangs in C and holds Python's lock; elsewhere a
    thread does, whatever the others wait for. If another process has the other end too, Linux
    ends this process a second after its parent.
    """

    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        libc = ctypes.CDLL(None)
        # A handler that needs no Python: SIGHUP is 1, so alarm(1) sends SIGALRM in a second.
        libc.signal(signal.SIGHUP, ctypes.cast(libc.alarm, ctypes.c_void_p))
        libc.prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG


def main(server: str, descriptor: int, lifeline: int) -> None:
    """Run a worker: what `Worker` starts in its own process."""
    for inherited in (descriptor, lifeline):
        os.set_inheritable(inherited, False)  # programs that this process starts must not hold it
    _die_with_parent(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    module, _, name = server.partition(":")
    serve(getattr(importlib.import_module(module), name)(), Connection(descriptor))
    os.killpg(0, signal.SIGKILL)  # an exit of this process alone would leave what it started
