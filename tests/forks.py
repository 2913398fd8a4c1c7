"""Runs tests in processes forked after collection: `pytest -p tests.forks --forks 2`.

Workers of pytest-xdist import and collect everything each, most of a minute. Here one process does
and runs no test itself, so that each process, one in a crashed one's place too, begins as it is.
It must not have initialized CUDA, which no forked process can use: with a GPU, take pytest-xdist.
"""

from __future__ import annotations

import atexit
import itertools
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    said = "run tests in N processes, forked after collection; auto: one a core"
    parser.addoption("--forks", default="0", metavar="N", help=said)


def pytest_configure(config: pytest.Config) -> None:
    forks = config.getoption("forks")
    count = len(os.sched_getaffinity(0)) if forks == "auto" else int(forks)
    if count:
        config.pluginmanager.register(Forks(config, count))


class Shares:
    """A range of tests for each process, in shared memory; an idle one takes half of one."""

    def __init__(self, tests: int, processes: int) -> None:
        self._lock = multiprocessing.get_context("fork").Lock()
        self._bounds = memoryview(mmap.mmap(-1, 16 * processes)).cast("q")
        cuts = [tests * n // processes for n in range(processes + 1)]
        for n, bound in enumerate(itertools.chain(*itertools.pairwise(cuts))):
            self._bounds[n] = bound

    def take(self, process: int) -> int | None:
        """The next test of a process, or None: no process has any left."""
        bounds, own = self._bounds, 2 * process
        with self._lock:
            if bounds[own] == bounds[own + 1]:
                sizes = {n: bounds[n + 1] - bounds[n] for n in range(0, len(bounds), 2)}
                largest = max(sizes, key=sizes.__getitem__)
                middle, end = (bounds[largest] + bounds[largest + 1]) // 2, bounds[largest + 1]
                bounds[largest + 1] = middle
                bounds[own], bounds[own + 1] = middle, end
            test = bounds[own]
            if test == bounds[own + 1]:
                return None
            bounds[own] += 1
            return test

    def drop(self) -> None:
        with self._lock:
            for n in range(0, len(self._bounds), 2):
                self._bounds[n] = self._bounds[n + 1]


@dataclass
class Process:
    """A forked process, as its parent knows it.

    Attributes:
        item: the test that it runs, or None.
        following: the index of its next one, which it has taken.
    """

    pid: int
    pipe: Connection
    item: pytest.Item | None = None
    following: int | None = None


class Forks:
    """Hands out tests and passes on what the processes report."""

    def __init__(self, config: pytest.Config, count: int) -> None:
        self._config, self._count = config, count
        self._to_parent: Connection | None = None  # in a forked process

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or self._config.option.collectonly:
            return None  # for pytest's own loop
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            raise pytest.UsageError("--forks: a forked process could not use the GPU; take -n")
        self._items, self._shares = session.items, Shares(len(session.items), self._count)
        capture = self._config.pluginmanager.getplugin("capturemanager")
        capture.read_global_capture()
        self._config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        self._temporary = tempfile.mkdtemp(prefix="nsagen-")
        processes = {}
        try:
            processes.update({n: self._fork(session, n) for n in range(self._count)})
            while processes:
                wait([process.pipe for process in processes.values()], timeout=1)
                for n, process in list(processes.items()):
                    if self._has_ended(process):
                        del processes[n]
                        if process.item is not None:
                            processes[n] = self._fork(session, n, process.following)
                if session.shouldfail:
                    self._shares.drop()
        finally:
            for process in processes.values():
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
            shutil.rmtree(self._temporary, ignore_errors=True)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        return True

    def _has_ended(self, process: Process) -> bool:
        """Pass on a process's messages; if it has crashed, its test has failed."""
        ended, status = os.waitpid(process.pid, os.WNOHANG)
        try:
            while process.pipe.poll():
                self._pass_on(process, *process.pipe.recv())
        except (EOFError, OSError):
            pass  # it has ended, or will at once
        if not ended:
            return False
        code = os.waitstatus_to_exitcode(status)
        if process.item is not None:
            said = f"its process ended with {code}" if code >= 0 else f"killed by signal {-code}"
            item = process.item
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")
            self._config.hook.pytest_runtest_logreport(report=report)
        elif code:
            raise RuntimeError(f"a process that ran tests ended with {code}")
        return True

    def _pass_on(self, process: Process, kind: str, message: Any) -> None:
        hook = self._config.hook
        if kind == "start":
            this, process.following = message
            process.item = self._items[this]
            hook.pytest_runtest_logstart(nodeid=process.item.nodeid, location=process.item.location)
        elif kind == "report":
            report = hook.pytest_report_from_serializable(config=self._config, data=message)
            hook.pytest_runtest_logreport(report=report)
        elif kind == "warning":
            text, path, line, more = message
            warning = warnings.WarningMessage(text, Warning, path, line)
            hook.pytest_warning_recorded.call_historic(kwargs={"warning_message": warning, **more})
        else:
            assert process.item is not None
            hook.pytest_runtest_logfinish(
                nodeid=process.item.nodeid, location=process.item.location
            )
            process.item = None

    def _fork(self, session: pytest.Session, n: int, first: int | None = None) -> Process:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()
        if pid := os.fork():
            sender.close()
            return Process(pid, receiver)
        code = 1
        try:
            receiver.close()
            self._to_parent = sender
            self._become_worker(n)
            self._run_tests(session, n, first)
            code = 0
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _become_worker(self, n: int) -> None:
        """Part with what processes would share: captured output, temporary files, a terminal."""
        plugins = self._config.pluginmanager
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()
        plugins.getplugin("terminalreporter")._tw._file = open(os.devnull, "w")  # noqa: SIM115
        tempfile.tempdir = tempfile.mkdtemp(prefix=f"{n}-", dir=self._temporary)
        factory = self._config._tmp_path_factory  # type: ignore[attr-defined]
        factory._basetemp = factory.mktemp(f"fork{n}-")

    def _run_tests(self, session: pytest.Session, n: int, first: int | None) -> None:
        this = self._shares.take(n) if first is None else first
        while this is not None:
            following = self._shares.take(n)
            item = self._items[this]
            self._send("start", (this, following))
            item.config.hook.pytest_runtest_protocol(
                item=item, nextitem=None if following is None else self._items[following]
            )
            self._send("finish", None)
            this = None if session.shouldfail else following

    def _send(self, kind: str, message: Any) -> None:
        if self._to_parent is not None:
            self._to_parent.send((kind, message))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._to_parent is not None:
            hook = self._config.hook
            data = hook.pytest_report_to_serializable(config=self._config, report=report)
            self._send("report", data)

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        more = {"when": when, "nodeid": nodeid, "location": location}
        self._send("warning", (text, warning_message.filename, warning_message.lineno, more))
