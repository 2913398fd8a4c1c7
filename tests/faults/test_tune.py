"""What can happen to a search: what was measured stays, records are whole, and it goes on."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages._rdb import storage as _optuna_storage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from nsagen.core.errors import NsagenError
from nsagen.records.files import load_records, save_records
from nsagen.records.record import TuningRecord
from nsagen.tune import final_round
from nsagen.tune import storage as nsagen_storage
from nsagen.tune.storage import open_storage
from tests.faults.support import forked, killed_at, small_disk
from tests.tune.conftest import Silent, World, forget_templates, one_op, world
from tests.tune.fake import FakeMeasurer
from tests.tune.test_interruption import World as CommandWorld
from tests.tune.test_interruption import _children_named

__all__ = ["one_op", "world"]  # fixtures

TRIALS = 8


def trials_of(url: str) -> dict[tuple[str, int], FrozenTrial]:
    """The finished trials of every study."""
    storage = open_storage(url)
    return {
        (name, trial.number): trial
        for name in optuna.get_all_study_names(storage)
        for trial in optuna.load_study(study_name=name, storage=storage).trials
        if trial.state == TrialState.COMPLETE
    }


def held(url: str) -> int:
    """Trials that keep a schedule from others: running, and signed by a process."""
    storage = open_storage(url)
    names = optuna.get_all_study_names(storage)
    trials = [t for n in names for t in optuna.load_study(study_name=n, storage=storage).trials]
    return sum(t.state == TrialState.RUNNING and "owner" in t.user_attrs for t in trials)


def goes_on(world: World, trials: int = TRIALS) -> TuningRecord:
    """The same command again: it keeps every finished trial and makes the ones that are missing."""
    before = trials_of(world.url) if (world.folder / "study.db").exists() else {}
    (record,) = world.tune(trials).records
    after = trials_of(world.url)
    assert before.keys() <= after.keys()
    assert all(after[key].values == before[key].values for key in before)
    assert len(after) == trials
    assert held(world.url) == 0
    assert [r.key for r in load_records(world.records).records] == [record.key]
    return record


def start_anew(world: World) -> None:
    for path in [*world.folder.glob("study.db*"), world.folder / "out"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("owner", "name", "every"),
    [(os, "replace", 1), (FakeMeasurer, "measure", 3), (Session, "commit", 41)],
    ids=["file", "measurement", "commit"],
)
def test_killed_before_each(world: World, owner: object, name: str, every: int) -> None:
    """Before a file of records is put in place, a measurement, or a commit to the study."""
    for step in itertools.count(0, every):
        killed = killed_at(step, lambda: world.tune(trials=4), (name,), owner)
        assert not list(world.folder.rglob("*.tmp.yaml"))
        if world.records.exists():
            assert load_records(world.records).records
        goes_on(world, trials=4)
        start_anew(world)
        if not killed:
            break
    assert step > 0


def test_two_searches_of_one_task_at_once(world: World) -> None:
    """They share the trials, and leave one record."""
    assert forked([lambda: world.tune(TRIALS)] * 2) == [0, 0]
    trials = trials_of(world.url)
    assert TRIALS <= len(trials) <= TRIALS + 4  # what was begun when the last was found
    schedules = [tuple(sorted(trial.params.items())) for trial in trials.values()]
    assert len(set(schedules)) == len(schedules)  # nothing was measured twice
    assert len(load_records(world.records).records) == 1


def test_searches_of_several_specs_at_once_lose_no_record(world: World) -> None:
    """All write into the file of one device."""
    text = world.spec.read_text()

    def search(dim: int) -> None:
        world.spec = world.folder / f"one{dim}.yaml"
        world.spec.write_text(text.replace("v_head_dim: 32", f"v_head_dim: {dim}"))
        world.tune(4)

    dims = (32, 48, 64)
    assert forked([lambda dim=dim: search(dim) for dim in dims]) == [0] * len(dims)
    found = [dict(record.workload.params) for record in load_records(world.records).records]
    assert sorted(found, key=str) == [{"v_head_dim": dim} for dim in dims]


def test_records_saved_at_once_are_all_kept(world: World) -> None:
    (record,) = world.tune(4).records
    rows = [
        replace(record, workload=replace(record.workload, params=(("v_head_dim", dim),)))
        for dim in range(64, 160, 8)
    ]

    def save(row: TuningRecord) -> None:
        save_records(world.tuned, "nvidia-h200", "cuda:90", [row])

    assert forked([lambda row=row: save(row) for row in rows]) == [0] * len(rows)
    kept = {r.key for r in load_records(world.records).records}
    assert kept == {r.key for r in (record, *rows)}


def test_a_clock_that_jumps_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time it is asked, it is a day earlier: searches end, go on and keep what they had."""
    asked = itertools.count()

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2030, 1, 1, tzinfo=tz) - timedelta(days=next(asked))

    monkeypatch.setattr(final_round, "datetime", Backwards)
    monkeypatch.setattr("time.time", lambda: 1.9e9 - 86400 * next(asked))
    for module in (_optuna_storage, nsagen_storage):
        monkeypatch.setattr(module, "datetime", Backwards)
    (first,) = world.tune(4).records
    second = goes_on(world)
    assert next(asked) > 2
    (kept,) = load_records(world.records).records
    assert replace(kept, date="") == replace(second, date="")
    assert kept.date > first.date  # the newest decides what a build takes


def told(world: World) -> str:
    with pytest.raises((NsagenError, OSError)) as error:
        world.tune(TRIALS)
    if isinstance(error.value, OSError):
        return str(error.value)
    (line,) = str(error.value).splitlines()
    return line


def test_no_room_for_the_study(world: World, tmp_path: Path) -> None:
    """The disk fills up during the search: one line, and with room it goes on."""
    place = tmp_path / "small"
    place.mkdir()
    world.url = f"sqlite:///{place / 'study.db'}"
    with small_disk(place, "400k") as resize:
        (place / "filler").write_bytes(b"0" * 60_000)
        line = told(world)
        assert re.search(r"--study sqlite:.*(disk is full|disk I/O error)", line), line
        resize("8m")
        goes_on(world)


def test_no_room_for_the_records(world: World) -> None:
    """What was measured is in the study: with room, the record needs no new measurement."""
    out = world.folder / "out"
    out.mkdir()
    with small_disk(out, "16k") as resize:
        (out / "filler").write_bytes(b"0" * 16_384)
        assert "No space left" in told(world)
        assert not world.records.exists()
        assert len(trials_of(world.url)) == TRIALS
        resize("1m")
        goes_on(world)


def test_a_file_where_the_folder_should_be(world: World) -> None:
    (world.folder / "out").touch()
    assert re.search("Not a directory|File exists", told(world))
    assert not (world.folder / "study.db").exists(), "refused before any trial"


def test_a_read_only_folder(world: World) -> None:
    out = world.folder / "out"
    out.mkdir()
    with small_disk(out, "1m,ro"):
        assert "Read-only file system" in told(world)
    assert not (world.folder / "study.db").exists(), "refused before any trial"
    goes_on(world)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_file_of_records(world: World, part: float) -> None:
    """It is told before anything is measured, and left alone."""
    world.tune(4)
    text = world.records.read_bytes()
    world.records.write_bytes(text[: int(len(text) * part)])
    cut = world.records.read_bytes()
    line = told(world)
    assert line.startswith(str(world.records))
    assert "fix or remove the record, and run nsagen tune" in line
    assert len(trials_of(world.url)) == 4
    assert world.records.read_bytes() == cut
    world.records.unlink()
    goes_on(world)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
def test_a_truncated_study(world: World, part: float) -> None:
    """One line that names the storage; without it, the search begins anew."""
    world.tune(4)
    path = world.folder / "study.db"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    for more in world.folder.glob("study.db-*"):
        more.unlink()
    line = told(world)
    assert line.startswith(f"tune: --study {world.url}: must ")
    start_anew(world)
    goes_on(world)


def test_a_missing_template(world: World) -> None:
    world.tune(4)
    template = world.folder / "templates" / "gated_sum" / "forward_elementwise.py.j2"
    text = template.read_text()
    template.unlink()
    forget_templates()
    assert told(world).startswith("templates/gated_sum/forward_elementwise.py.j2: ")
    assert len(load_records(world.records).records) == 1
    template.write_text(text)
    forget_templates()
    goes_on(world)


@pytest.mark.slow
def test_the_command_killed_every_50_ms(tmp_path: Path) -> None:
    """`nsagen tune` from start to end, each time into a new folder; every tenth goes on."""
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = CommandWorld(folder)
        command.behave({"": "slow 0.05"})
        process = command.start(trials=6)
        time.sleep(0.05 * number)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        ended = process.returncode == 0
        records = folder / "out" / "one" / "nvidia-h200.yaml"
        assert not ended or records.is_file()
        if records.is_file():
            assert load_records(records).records
        done = trials_of(command.url) if (folder / "study.db").is_file() else {}
        end = time.monotonic() + 30  # one that was still importing sees only later that it is alone
        while children := _children_named(folder):
            assert time.monotonic() < end, children
        if number % 10 == 0 or ended:
            (record,) = command.run(trials=6)
            assert record["measured"] == 6
            assert done.keys() <= trials_of(command.url).keys()
        if ended:
            break


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_records_that_could_not_be_written_are_refused_before_any_work(
    world: World, kind: str
) -> None:
    world.tuned.mkdir(parents=True)
    if kind == "folder":
        world.records.mkdir()
    elif kind == "link":
        world.records.symlink_to(world.folder / "nowhere" / "a.yaml")
    else:
        os.mkfifo(world.records)
    watcher = Silent()
    with pytest.raises((OSError, NsagenError)) as error:
        world.tune(watcher=watcher)
    assert (
        "nowhere/a.yaml" in str(error.value)
        if kind == "link"
        else str(world.records) in str(error.value)
    )
    assert not watcher.steps
