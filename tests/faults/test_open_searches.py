"""What can happen to a search: kill -9 while several are open, two at once, clocks that jump."""

from __future__ import annotations

import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from nsagen.core.bucket import Bucket
from nsagen.records.files import load_records, save_records
from nsagen.records.record import TuningRecord
from nsagen.tune.storage import open_storage
from tests.faults.support import killed_at
from tests.one_op import one_op
from tests.tune.conftest import World as InProcess
from tests.tune.conftest import world as in_process
from tests.tune.test_interruption import World, wait_for, world

__all__ = ["in_process", "one_op", "world"]  # fixtures

SEVERAL = ("--seqlens", "1024,8192,65536", "--jobs", "3")


def trials(world: World) -> dict[str, list[FrozenTrial]]:
    """Study -> its trials."""
    storage = open_storage(world.url)
    names = optuna.get_all_study_names(storage)
    return {n: optuna.load_study(study_name=n, storage=storage).trials for n in names}


def check_each_schedule_once(world: World) -> None:
    """No trial keeps a schedule from others, and none was measured twice.

    One that was killed before it was signed keeps none; it is taken back when it is old.
    """
    for found in trials(world).values():
        assert TrialState.RUNNING not in {t.state for t in found if "owner" in t.user_attrs}
        done = [t.user_attrs["schedule"] for t in found if t.state == TrialState.COMPLETE]
        assert len(set(done)) == len(done)


def note_life(world: World, when: str) -> None:
    """Have the running trials' last sign of life at a time, as after a clock's jump."""
    with sqlite3.connect(world.folder / "study.db", timeout=60) as file:
        file.execute("DELETE FROM trial_heartbeats")
        noted = file.execute(
            "INSERT INTO trial_heartbeats (trial_id, heartbeat) "
            "SELECT trial_id, datetime('now', ?) FROM trials WHERE state = 'RUNNING'",
            (when,),
        ).rowcount
    assert noted > 0


def test_kill_9_while_several_searches_are_open(world: World) -> None:
    world.behave({"": "slow 0.05"})
    process = world.start(200, *SEVERAL)
    wait_for(world, complete=9)
    open_then = [n for n, found in trials(world).items() if found]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    done = {n: sum(t.state == TrialState.COMPLETE for t in f) for n, f in trials(world).items()}
    assert len(open_then) == 3

    world.behave({})
    records = world.run(max(done.values()) + 2, *SEVERAL)
    assert len(records) == 3
    assert {r["measured"] for r in records} == {max(done.values()) + 2}
    check_each_schedule_once(world)


def test_two_at_once_on_one_study(world: World) -> None:
    world.behave({"": "slow 0.02"})
    both = [world.start(6, *SEVERAL) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, output + errors
    check_each_schedule_once(world)
    (file,) = (world.folder / "out").glob("one/*.yaml")
    records = load_records(file).records
    assert len(records) == 3
    for record in records:
        assert record.measured >= 6


def test_a_clock_that_was_set_back(world: World) -> None:
    """Signs of life from the future do not keep a dead process's schedules."""
    world.behave({"": "slow 0.5"})
    process = world.start(200)
    wait_for(world, complete=2)
    process.kill()
    process.communicate(timeout=30)
    note_life(world, "+1 day")
    (done,) = (
        [t.state for t in found].count(TrialState.COMPLETE) for found in trials(world).values()
    )
    world.behave({})
    (record,) = world.run(done + 6)
    assert record["measured"] == done + 6
    check_each_schedule_once(world)


def test_a_clock_that_was_set_forward(world: World) -> None:
    """Another process takes ours for dead: what it measures meanwhile is kept all the same."""
    world.behave({"": "slow 0.5"})
    process = world.start(8)
    wait_for(world, complete=2)
    note_life(world, "-1 day")
    (study,) = trials(world)
    optuna.storages.fail_stale_trials(
        optuna.load_study(study_name=study, storage=open_storage(world.url))
    )
    assert TrialState.FAIL in {t.state for t in trials(world)[study]}
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    check_each_schedule_once(world)
    (found,) = trials(world).values()
    done = [t for t in found if t.state == TrialState.COMPLETE]
    assert len(done) >= 8
    assert all(t.user_attrs["outcome"]["ms"] for t in done)


@pytest.fixture
def record(in_process: InProcess) -> TuningRecord:
    return in_process.tune(trials=4).records[0]


def test_a_record_is_never_older_than_those_that_are_there(
    record: TuningRecord, tmp_path: Path
) -> None:
    """The newest decides which buckets a build uses; a clock set back must not turn that round."""
    other = replace(record, bucket=Bucket(tokens=(9, None)), date="2001-01-01T00:00:00Z")
    save_records(tmp_path, "gpu", "cuda:90", [record])
    save_records(tmp_path, "gpu", "cuda:90", [other])
    first, second = sorted(load_records(tmp_path / "gpu.yaml").records, key=lambda r: r.date)
    assert (first.bucket, second.bucket) == (record.bucket, other.bucket)
    assert first.date == record.date < second.date


@pytest.mark.parametrize("step", range(3))
def test_killed_while_a_record_is_written(record: TuningRecord, tmp_path: Path, step: int) -> None:
    """The file is the old one or the new one."""
    save_records(tmp_path, "gpu", "cuda:90", [record])
    new = replace(record, ms=record.ms / 2)
    came = killed_at(step, lambda: save_records(tmp_path, "gpu", "cuda:90", [new]))
    (found,) = load_records(tmp_path / "gpu.yaml").records
    assert found == (record if came else new)
    save_records(tmp_path, "gpu", "cuda:90", [new])
    assert load_records(tmp_path / "gpu.yaml").records == (new,)
