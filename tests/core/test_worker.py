"""Workers: every way to fail costs one request, and none outlives the process that made it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shelve
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsagen.core.errors import WorkerError
from nsagen.core.worker import Worker, map_in_workers

ROOT = Path(__file__).resolve().parents[2]
SERVER = "tests.core.test_worker:Naughty"


class Naughty:
    """A server with one method for each way to fail."""

    def is_broken_by(self, error: Exception) -> bool:
        return "illegal" in str(error)

    def add(self, a: int, b: int) -> int:
        return a + b

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        print("Segmentation fault in ptxas", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(self) -> None:
        os._exit(7)

    def hang(self) -> None:
        time.sleep(1e6)

    def illegal(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def hang_in_c(self) -> None:
        """Holds Python's lock meanwhile."""
        ctypes.PyDLL(None).sleep(1000)

    def start_a_program(self) -> int:
        return subprocess.Popen(["sleep", "1000"]).pid

    def surroundings(self) -> dict[str, str | None]:
        import shelve  # what nothing has imported so far

        return {"interpreter": os.environ.get("TRITON_INTERPRET"), "shelve": shelve.__file__}

    def memory(self) -> None:
        raise MemoryError("out of memory")


class NeverStarts:
    def __init__(self) -> None:
        raise ImportError("libcuda.so.1 is missing")


@pytest.fixture
def worker():
    made = Worker(SERVER)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("method", "reason", "restarts"),
    [
        ("die", "crash: signal SIGSEGV: Segmentation fault in ptxas", True),
        ("leave", "crash: exit code 7", True),
        ("hang", "hang: no answer in 1 s", True),
        (
            "illegal",
            "RuntimeError: CUDA error: an illegal memory access was encountered",
            True,
        ),
        ("memory", "MemoryError: out of memory", False),
        ("no_such_method", "AttributeError: 'Naughty' object has no attribute", False),
    ],
)
def test_a_failure_has_a_reason_and_the_next_request_an_answer(
    worker: Worker, method: str, reason: str, restarts: bool
) -> None:
    first = worker.ask("pid", limit_s=60).value
    reply = worker.ask(method, limit_s=1)
    assert reply.value is None
    assert reply.reason.startswith(reason)
    assert worker.ask("add", 1, 2, limit_s=60).value == 3
    assert (worker.ask("pid", limit_s=60).value != first) is restarts
    assert worker.starts == 1 + restarts


def test_a_worker_killed_from_outside_is_replaced(worker: Worker) -> None:
    os.kill(worker.ask("pid", limit_s=60).value, signal.SIGKILL)
    replies = [worker.ask("add", 1, 2, limit_s=60) for _ in range(2)]
    assert replies[-1].value == 3
    assert replies[0].value == 3 or replies[0].reason == "crash: signal SIGKILL"


def test_ctrl_c_ends_the_worker_and_reaches_the_caller(worker: Worker) -> None:
    pid = worker.ask("pid", limit_s=60).value
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        worker.ask("hang", limit_s=60)
    assert not Path(f"/proc/{pid}").exists()


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(WorkerError, match=r"libcuda\.so\.1 is missing"):
        Worker("tests.core.test_worker:NeverStarts").ask("pid", limit_s=60)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PARENT = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and SIGINT in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
from nsagen.core.worker import Worker
worker = Worker("tests.core.test_worker:Naughty")
print(worker.ask("pid", limit_s=60).value, flush=True)
print(worker.ask("start_a_program", limit_s=60).value, flush=True)
worker.ask(sys.argv[1], limit_s=1000)
"""


def end_within(seconds: float, pids: list[int]) -> bool:
    """Whether processes end in time; those that do not are killed."""
    end = time.monotonic() + seconds
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            descriptor = os.pidfd_open(pid)
            ended = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]
            found.append(bool(ended))
            if not ended:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
    return all(found)


@pytest.mark.skipif(sys.platform != "linux", reason="watches processes that are not its children")
@pytest.mark.parametrize("busy", ["hang", "hang_in_c"])
@pytest.mark.parametrize("sign", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_no_process_outlives_the_one_that_made_the_worker(busy: str, sign: str) -> None:
    """A signal to that one alone; the worker runs a program, as Triton runs ptxas.

    Left alone, both would go on for 1000 s.
    """
    if busy == "hang_in_c" and sign != "SIGKILL":
        pytest.skip("what holds the lock makes no difference to how the parent ends")
    command = [sys.executable, "-c", PARENT, busy]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(signal.Signals[sign])
        assert end_within(60, pids)


@pytest.mark.skipif(sys.platform != "linux", reason="watches processes that are not its children")
def test_a_worker_that_nobody_closed_ends_what_it_started() -> None:
    """The connection ends before the process that made the worker, which sleeps."""
    leave = "worker._connection.close(); import time; time.sleep(1000)"
    command = [sys.executable, "-c", PARENT.replace("worker.ask(sys.argv[1], limit_s=1000)", leave)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert end_within(60, [int(parent.stdout.readline()) for _ in range(2)])
        parent.kill()


def test_closing_a_worker_ends_what_it_started(worker: Worker) -> None:
    pids = [worker.ask(m, limit_s=60).value for m in ("pid", "start_a_program")]
    worker.close()
    assert end_within(60, pids)
    with pytest.raises(WorkerError, match="it was closed"):
        worker.ask("pid", limit_s=60)


def test_leaving_a_queue_cancels_it(tmp_path: Path) -> None:
    """The second call would take 1000 s, and the third would leave a file."""
    calls = [(["true"],), (["sleep", "1000"],), (["touch", str(tmp_path / "begun")],)]
    with contextlib.closing(map_in_workers(subprocess.call, calls, 1, 60)) as results:
        assert next(results) == 0
    assert not list(tmp_path.iterdir())


def test_a_call_that_fails_is_named() -> None:
    with pytest.raises(WorkerError, match=r"loads\(never\): must succeed; JSONDecodeError"):
        list(map_in_workers(json.loads, [("never",)], 1, 60))


def test_nothing_of_the_parents_surroundings_changes_what_a_worker_does(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shelve.py").write_text("raise SystemExit('of the working folder')")
    (tmp_path / "json.py").write_text("raise SystemExit('of the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(ROOT), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    found = worker.ask("surroundings", limit_s=60)
    assert (found.value, found.reason) == ({"interpreter": None, "shelve": shelve.__file__}, "")
