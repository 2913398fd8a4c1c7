"""A PostgreSQL server on loopback for one test, from Debian's package."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

SERVERS = Path("/usr/lib/postgresql")
"""Where Debian's package puts each version."""


@contextmanager
def server() -> Iterator[str]:
    """Run a server for as long as this lasts; yields its URL. Skips the test where it can't."""
    found = sorted(SERVERS.glob("*/bin/initdb"))
    if not found:
        _missing("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        _missing("psycopg is not installed")
    user = _unprivileged()
    tools = found[-1].parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not below pytest's folder, which every start of pytest closes to other users.
    with tempfile.TemporaryDirectory(prefix="nsagen-postgresql-", dir="/tmp") as folder:
        if user is not None:
            shutil.chown(folder, user, user)
        data = Path(folder) / "data"
        _run([tools / "initdb", "-D", data, "-U", "nsagen", "-A", "trust", "--no-sync"], user)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        control = [tools / "pg_ctl", "-D", data, "-l", Path(folder) / "log", "-w", "-t", "100"]
        _run([*control, "-o", f"{options} -c fsync=off", "start"], user)
        try:
            yield f"postgresql+psycopg://nsagen@127.0.0.1:{port}/postgres"
        finally:
            _run([*control, "-m", "immediate", "stop"], user)


def _missing(what: str) -> NoReturn:
    """Skip the test, or fail it if the caller said that nothing is missing."""
    if os.environ.get("NSAGEN_NEEDS_POSTGRESQL"):
        pytest.fail(f"NSAGEN_NEEDS_POSTGRESQL is set, but {what}")
    pytest.skip(what)


def _unprivileged() -> str | None:
    """The user to run the server as; PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        _missing("PostgreSQL refuses to run as root, and there is no user postgres")
    return "postgres"


def _run(command: Sequence[object], user: str | None) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        user=user,
        cwd="/",
        stdout=subprocess.DEVNULL,  # the server inherits them: a pipe would never end
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} {command[-1]} failed"
