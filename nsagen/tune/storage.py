"""Where studies are kept: a local file by default, or any storage that Optuna has a URL for."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from nsagen.core.errors import InvalidInputError, TuneError
from nsagen.core.files import locked

HEARTBEAT_S = 20
"""Seconds between heartbeats of a trial in a database that several machines share."""

PROXY_PORT = 13000
"""Port of Optuna's gRPC proxy when a URL names none."""

PROXY_WAIT_S = 10.0
"""Seconds that a proxy has to answer."""

_OPTUNAS = {
    "version_info": {"version_info_id", "schema_version", "library_version"},
    "studies": {"study_id", "study_name"},
    "trials": {"trial_id", "study_id", "state"},
}
"""Tables, each with some of its columns, that tell Optuna's databases of all versions."""

_TABLES = r"stud(y|ies)(_\w+)?|trials?(_\w+)?|version_info|alembic_version"
"""Names of its tables."""

_EXAMPLES = "sqlite:///tune.db, postgresql+psycopg://user@host/name, grpc://host:13000"


def open_storage(url: str) -> BaseStorage:
    """The storage that a URL names; makes files and tables as needed.

    Args:
        url: of a database as SQLAlchemy writes it, `journal:///path` for Optuna's journal file,
            or `grpc://host:port` for its proxy.

    Raises:
        InvalidInputError: not such a URL.
        TuneError: the storage cannot be opened.
    """
    scheme, separator, rest = url.partition("://")
    if not (scheme and separator and rest):
        raise InvalidInputError(
            f"tune: --study must be a storage's URL; got {url!r}; such as {_EXAMPLES}"
        )
    try:
        if scheme == "journal":
            _check_file(url, Path(rest))
            return _journal(Path(rest))
        if scheme == "grpc":
            return _proxy(rest)
        if scheme == "sqlite":
            path = _sqlite_path(rest)
            _check_file(url, path)
            _check_sqlite(path)
            with locked(path.parent, path.name):  # two processes that make the tables conflict
                return _database(url, path)
        return _shared_database(url)
    except (InvalidInputError, TuneError):
        raise
    except Exception as error:  # drivers raise their own types; SQLAlchemy wraps only some
        last = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TuneError(
            f"tune: --study {url}: must be a storage that can be opened; it said: {last}; "
            + (
                "name a file that can be written, such as --study sqlite:///tune.db"
                if scheme in ("journal", "sqlite")
                else "check that it runs and that its driver is installed"
            )
        ) from error


def _check_file(url: str, path: Path) -> None:
    if path.is_dir():
        raise TuneError(
            f"tune: --study {url}: must name a file; got the folder {path}; name a file in it"
        )
    if path.exists() and not path.is_file():
        raise TuneError(
            f"tune: --study {url}: must name a file; got a pipe or device; name another"
        )


def sqlite_url(path: Path) -> str:
    """The URL of a database in a local file, whatever characters its name has."""
    return f"sqlite:///{quote(os.fsencode(path.absolute()))}"


def _sqlite_path(rest: str) -> Path:
    """The file that the text after `sqlite://` in a URL names."""
    return Path(os.fsdecode(unquote_to_bytes(rest.removeprefix("/").partition("?")[0])))


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn an error of the open storage that `url` names into a TuneError."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, OSError, *_proxy_errors()) as error:
        if isinstance(error, OSError) and not url.startswith("journal:"):
            raise  # of another file
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        said = str(getattr(cause, "orig", None) or cause or error).strip().splitlines()[0]
        raise TuneError(
            f"tune: --study {url}: must stay readable and writable; it said: {said}; "
            "fix that, and the same command goes on from what it kept"
        ) from error


def _proxy(address: str) -> BaseStorage:
    """Optuna's proxy at `host:port`, once it answers; what is behind it is the server's concern."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        host, port = address, str(PROXY_PORT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    proxy.wait_server_ready(timeout=PROXY_WAIT_S)
    return proxy


def _proxy_errors() -> tuple[type[Exception], ...]:
    """What a proxy raises when it stops answering, if its package is installed."""
    try:
        import grpc
    except ImportError:
        return ()
    return (grpc.RpcError,)


def _check_sqlite(path: Path) -> None:
    """Refuse another program's database, to which Optuna would add its tables."""
    if not path.is_file():
        return
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
        rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        names = {name for (name,) in rows}
        known = {
            table: {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            for table in _OPTUNAS.keys() & names
        }
    is_own = all(_OPTUNAS[table] <= columns for table, columns in known.items())
    if len(known) < len(_OPTUNAS):  # another process is making the tables, or was killed
        is_own &= all(re.fullmatch(_TABLES, name) for name in names)
    if not is_own:
        shown = ", ".join(sorted(names)[:4])
        raise TuneError(
            f"{path}: must be a database that Optuna wrote, or free; got one with {shown}; "
            "nothing was changed; name another file"
        )


def _shared_database(url: str) -> RDBStorage:
    """A database on a server, whose tables another process may be making right now."""
    for pause in (0.5, 2.0, 5.0):
        try:
            return _database(url)
        except (ProgrammingError, IntegrityError):
            time.sleep(pause)
    return _database(url)


def _database(url: str, path: Path | None = None) -> RDBStorage:
    """A database by its URL or, for SQLite without options, by its file.

    Optuna and SQLAlchemy each give special meaning to some characters of a URL: {}, % and others.
    """
    arguments: dict[str, Any] = {}
    if path is None:
        arguments["pool_pre_ping"] = True
    elif "?" in url:
        arguments["connect_args"] = {"timeout": 60}
    else:
        url = "sqlite:///study.db"  # no part of it is used
        arguments["creator"] = lambda: sqlite3.connect(path, timeout=60, check_same_thread=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # about heartbeats
        storage = RDBStorage(
            url,
            engine_kwargs=arguments,
            heartbeat_interval=HEARTBEAT_S,
            grace_period=4 * HEARTBEAT_S,
        )
    if path is not None:

        @event.listens_for(storage.engine, "connect")
        def _fast(connection: Any, record: object) -> None:
            connection.execute("PRAGMA journal_mode=WAL")  # survives a kill, and is fast
            connection.execute("PRAGMA synchronous=NORMAL")

        storage.engine.dispose()
    return storage


def _journal(path: Path) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_journal(path)
    trim_torn_tail(path)
    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


def _check_journal(path: Path) -> None:
    """Refuse a file that is not a journal, before cutting or adding anything."""
    if not path.exists():
        return
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    if first and not first.startswith(b'{"op_code":'):
        raise TuneError(
            f"tune: --study journal://{path}: must be a journal that Optuna wrote, or free; "
            "got another file; name another"
        )


def trim_torn_tail(path: Path) -> int:
    """Cut an unfinished last line off a journal, and return how many bytes it had.

    A writer that was killed leaves half a record. The journal would load once more, then break
    for good when the next record is appended to that half.
    """
    if not path.is_file():
        return 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return len(data) - whole


def owner() -> str:
    """What a trial notes about its process: host, process and when it started."""
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"


def owner_is_dead(text: str) -> bool:
    """Whether the noted process ran on this host and is gone; False if that is unknown."""
    host, _, rest = text.partition(" ")
    pid, _, started = rest.partition(" ")
    return host == socket.gethostname() and pid.isdigit() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process started, as the kernel counts it; empty if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def release_dead_trials(study: optuna.Study) -> int:
    """Fail the running trials of dead processes, which frees their schedules.

    At once on this host; on others when their heartbeat is overdue, if the storage has one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    dead = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if owner_is_dead(trial.user_attrs.get("owner", "")) or _never_owned(trial)
    ]
    for trial in dead:
        with contextlib.suppress(ValueError):  # another process was faster
            study.tell(trial.number, state=TrialState.FAIL)
    return len(dead)


def _never_owned(trial: FrozenTrial) -> bool:
    """Whether its process died before it could sign the trial: old and unsigned."""
    if "owner" in trial.user_attrs or trial.datetime_start is None:
        return False
    return (datetime.now() - trial.datetime_start).total_seconds() > 4 * HEARTBEAT_S


@contextlib.contextmanager
def heartbeats(storage: BaseStorage, running: dict[int, Any]) -> Iterator[None]:
    """Meanwhile, report that the trials in `running` (by id) are being worked on."""
    if not isinstance(storage, RDBStorage):
        # The cached wrapper of a database offers the same methods.
        storage = getattr(storage, "_backend", storage)
    if not isinstance(storage, RDBStorage) or storage.get_heartbeat_interval() is None:
        yield
        return
    stop = threading.Event()

    def beat(database: RDBStorage) -> None:
        while not stop.wait(HEARTBEAT_S):
            for trial_id in list(running):
                with contextlib.suppress(Exception):  # the next beat makes up for a lost one
                    database.record_heartbeat(trial_id)

    thread = threading.Thread(target=beat, args=(storage,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
