"""Several workers behind Optuna's gRPC proxy, one of them killed; and a proxy that goes away."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest

from nsagen.core.errors import TuneError
from nsagen.tune import storage
from nsagen.tune.storage import open_storage, storage_errors
from tests.faults.support import free_port
from tests.tune.test_interruption import World
from tests.tune.two_workers import check_two_workers

pytest.importorskip("grpc", reason="needs nsagen[grpc]")

SERVE = """
import sys
from optuna.storages import run_grpc_proxy_server
from nsagen.tune.storage import open_storage
run_grpc_proxy_server(open_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def proxy(folder: Path) -> Iterator[str]:
    """Run a proxy in front of a database in `folder` for as long as this lasts; yields its URL."""
    port = free_port()
    command = [sys.executable, "-c", SERVE, f"sqlite:///{folder / 'behind.db'}", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not answers(port):  # it imports for seconds, on a busy machine for many
            assert server.poll() is None, "the proxy has ended"
            time.sleep(0.05)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_two_workers_share_a_study_and_one_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    with proxy(tmp_path) as world.url:
        check_two_workers(world)


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PROXY_WAIT_S", 0.2)
    with pytest.raises(TuneError, match="must be a storage that can be opened"):
        open_storage(f"grpc://127.0.0.1:{free_port()}")


def test_the_proxy_goes_away(tmp_path: Path) -> None:
    with proxy(tmp_path) as url:
        study = optuna.create_study(storage=open_storage(url))
    with pytest.raises(TuneError, match="the same command goes on"), storage_errors(url):
        study.ask()
