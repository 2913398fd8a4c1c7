"""Where studies are kept."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from nsagen.core.errors import InvalidInputError, TuneError
from nsagen.tune.storage import (
    open_storage,
    owner,
    owner_is_dead,
    release_dead_trials,
    sqlite_url,
    trim_torn_tail,
)


def study_in(url: str, name: str = "s") -> optuna.Study:
    return optuna.create_study(storage=open_storage(url), study_name=name, load_if_exists=True)


def test_a_torn_journal_loses_the_torn_record_only(tmp_path: Path) -> None:
    url, path = f"journal://{tmp_path / 'j.log'}", tmp_path / "j.log"
    study = study_in(url)
    for value in (1.0, 2.0):
        study.tell(study.ask(), value)
    path.write_bytes(path.read_bytes()[:-7])  # in the middle of the last record
    for _ in range(2):  # without the cut, the second time fails
        study = study_in(url)
        study.tell(study.ask(), 3.0)
    states = [trial.state for trial in study_in(url).trials]
    assert states.count(TrialState.COMPLETE) == 3
    assert trim_torn_tail(path) == 0


@pytest.mark.parametrize("url", ["study.db", "sqlite://", "://x", ""])
def test_what_is_no_url_is_wrong_usage(url: str) -> None:
    with pytest.raises(InvalidInputError, match="must be a storage's URL"):
        open_storage(url)


@pytest.mark.parametrize(
    "url", ["nonsense://host/name", "postgresql+psycopg://127.0.0.1:9/none?connect_timeout=1"]
)
def test_a_storage_that_cannot_be_opened_says_why(url: str) -> None:
    with pytest.raises(TuneError, match="must be a storage that can be opened; it said"):
        open_storage(url)


@pytest.mark.parametrize("scheme", ["journal://", "sqlite:///"])
@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("folder", "must name a file; got the folder .*; name a file in it"),
        ("file/study", "must be a storage that can be opened; .*; name a file that can be written"),
        ("foreign", "foreign|not a database"),
    ],
)
def test_what_is_no_file_for_a_study(tmp_path: Path, scheme: str, place: str, text: str) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("file", "foreign"):
        (tmp_path / name).write_text("mine\n")
    with pytest.raises(TuneError, match=text):
        open_storage(f"{scheme}{tmp_path / place}")
    assert not list((tmp_path / "folder").iterdir())
    assert {(tmp_path / name).read_text() for name in ("file", "foreign")} == {"mine\n"}


def test_several_processes_may_make_a_database_at_once(tmp_path: Path) -> None:
    code = "import sys; from nsagen.tune.storage import open_storage; open_storage(sys.argv[1])"
    url = f"sqlite:///{tmp_path / 'new' / 'study.db'}"
    running = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]


def test_a_trial_that_nobody_signed_is_released_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was killed between asking for it and signing it."""
    study = study_in(f"journal://{tmp_path / 'j.log'}")
    study.ask()
    signed = study.ask()
    signed.set_user_attr("owner", owner())
    assert release_dead_trials(study) == 0
    monkeypatch.setattr("nsagen.tune.storage.HEARTBEAT_S", -1)
    assert release_dead_trials(study) == 1
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.RUNNING]


def test_an_owner_is_dead_when_its_process_is() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = owner()
    host = mine.split()[0]
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    theirs = f"{host} {process.pid} {started}"
    assert not owner_is_dead(mine)
    assert not owner_is_dead(theirs)
    process.communicate()
    assert owner_is_dead(theirs)
    assert owner_is_dead(f"{host} {os.getpid()} 1")  # the number was given to another process
    assert not owner_is_dead(f"elsewhere {process.pid} {started}")


@pytest.mark.parametrize("name", ["a b é", "100%40", "a#b", "why?x=1", "{build}", "[red]", "a'\"b"])
def test_a_database_may_lie_in_any_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "study.db"
    study_in(sqlite_url(path)).tell(study_in(sqlite_url(path)).ask(), 1.0)
    assert path.stat().st_size > 0


@pytest.mark.parametrize("content", [b"notes\n", b"no line break", b"[1]\n", b"\xff\0"])
def test_a_file_of_the_users_is_not_taken_for_a_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.log"
    path.write_bytes(content)
    with pytest.raises(TuneError, match="must be a journal that Optuna wrote, or free"):
        open_storage(f"journal://{path}")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "tables",
    [
        ["accounts (owner)"],
        ["accounts (owner)", "studies (study_id, study_name, patient)"],
        ["accounts (owner)", "version_info (version)"],
        ["accounts (owner)", "studies (name)", "trials (drug)", "version_info (schema_version)"],
    ],
)
def test_a_database_of_another_program_is_refused_unchanged(
    tmp_path: Path, tables: list[str]
) -> None:
    path = tmp_path / "my bank.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in tables:
            database.execute(f"CREATE TABLE {table}")
        database.commit()
    before = path.read_bytes()
    with pytest.raises(TuneError, match=r"must be a database that Optuna wrote.*accounts"):
        open_storage(sqlite_url(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["my bank.db"]


def test_a_database_without_all_its_tables_is_completed(tmp_path: Path) -> None:
    """The process that made it was killed, or is still at it."""
    path = tmp_path / "new.db"
    path.write_bytes(b"")  # as `mktemp` makes it
    study_in(sqlite_url(path))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE version_info")
        database.commit()
    assert study_in(sqlite_url(path)).trials == []
    assert study_in(sqlite_url(path)).trials == []
