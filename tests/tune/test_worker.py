"""Workers: every way to fail costs one request, and the next one is answered."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nsagen.core.errors import TuneError
from nsagen.tune.worker import Worker

SERVER = "tests.tune.test_worker:Naughty"


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
    with pytest.raises(TuneError, match=r"libcuda\.so\.1 is missing"):
        Worker("tests.tune.test_worker:NeverStarts").ask("pid", limit_s=60)
