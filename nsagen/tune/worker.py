"""A worker process that may crash, hang or run out of memory without harm to the search.

The worker makes one `Server` object and calls its methods as asked, one at a time. It is
replaced when it dies, when an answer is late, and when the server says that an error has left
it unusable (after an illegal memory access every later CUDA call of a process fails).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from nsagen.core.errors import TuneError

START_S = 180.0
"""Seconds that a worker may take to import what it needs and answer for the first time."""


_MAIN = "import sys; from nsagen.tune.worker import main; main(sys.argv[1], int(sys.argv[2]))"


class Server(Protocol):
    """What runs in a worker. Its other methods are what the worker can be asked for."""

    def is_broken_by(self, error: Exception) -> bool:
        """Whether nothing that this process does after the error can be trusted."""
        ...


@dataclass(frozen=True)
class Reply:
    """A worker's answer: a value, or the reason why there is none."""

    value: Any = None
    reason: str = ""
    broken: bool = False


class Worker:
    """A process that answers requests, restarted whenever one has killed it.

    Args:
        server: the class to make in it, as "module:class".
        environment: variables to set in it.
    """

    def __init__(self, server: str, environment: Mapping[str, str] | None = None) -> None:
        self._server = server
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the worker
        self._ready = False
        self.starts = 0

    @property
    def alive(self) -> bool:
        """Whether the process that answered last still runs, with what it has in memory."""
        return self._process is not None and self._process.poll() is None

    def ask(self, method: str, *args: Any, limit_s: float) -> Reply:
        """Call a method of the server.

        Returns:
            its value; or why there is none: its exception, or that the process died, or that it
            was killed for not answering within `limit_s`.

        Raises:
            TuneError: a fresh worker cannot be started.
        """
        if not self.alive:
            self.spawn()
        if not self._ready:
            self._await()
        assert self._connection is not None
        try:
            self._connection.send((method, args))
            if not self._connection.poll(limit_s):
                self.close()
                return Reply(reason=f"hang: no answer in {limit_s:.0f} s")
            reply: Reply = self._connection.recv()
        except (EOFError, OSError):
            return Reply(reason=self._obituary())
        except BaseException:  # Ctrl-C: what the process is at cannot be trusted to end
            self.close()
            raise
        if reply.broken:
            self.close()
        return reply

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def spawn(self) -> None:
        """Begin to start the process; the first request waits until it is there."""
        self.close()
        self.starts += 1
        self._ready = False
        ours, theirs = socket.socketpair()
        self._errors.seek(0)
        self._errors.truncate()
        command = [sys.executable, "-c", _MAIN, self._server, str(theirs.fileno())]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, **self._environment},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    def _await(self) -> None:
        assert self._connection is not None
        try:
            if self._connection.poll(START_S) and self._connection.recv().value == "ready":
                self._ready = True
                return
        except (EOFError, OSError):
            pass
        text = self._obituary()
        raise TuneError(f"tune: a worker ({self._server}) must start; {text}; see nsagen doctor")

    def _obituary(self) -> str:
        """How the process ended, and the last thing it said."""
        if self._process is None:  # another thread has closed the worker
            return "crash: the worker was closed"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        how = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"signal {signal.Signals(-code).name}"
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
        except Exception as error:  # whatever it is, it concerns this request only
            lines = str(error).strip().splitlines() or ["no message"]
            reason = f"{type(error).__name__}: {lines[0][:200]}"
            reply = Reply(reason=reason, broken=server.is_broken_by(error))
        connection.send(reply)


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent is gone, even in the midst of a hang."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(server: str, descriptor: int) -> None:
    """Run a worker: what `Worker` starts in a process of its own."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    module, _, name = server.partition(":")
    serve(getattr(importlib.import_module(module), name)(), Connection(descriptor))
