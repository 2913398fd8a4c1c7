"""Several workers on one study in a real database, one of them killed in the midst of it."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from nsagen.tune.storage import open_storage
from tests.tune import postgresql
from tests.tune.postgresql import server
from tests.tune.test_interruption import World


def trials(url: str) -> list[FrozenTrial]:
    storage = open_storage(url)
    names = optuna.get_all_study_names(storage)
    return [t for n in names for t in optuna.load_study(study_name=n, storage=storage).trials]


def wait_for(url: str, complete: int) -> None:
    end = time.monotonic() + 120
    while sum(t.state == TrialState.COMPLETE for t in trials(url)) < complete:
        assert time.monotonic() < end, "the workers do not get on"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("needed", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)]
)
def test_without_a_server_the_test_skips_or_fails_as_one_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("NSAGEN_NEEDS_POSTGRESQL", needed)
    monkeypatch.setattr(postgresql, "SERVERS", tmp_path)
    with pytest.raises(outcome, match="PostgreSQL's server is not installed"), server():
        pass


def test_two_workers_share_a_study_and_one_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    with server() as world.url:
        world.behave({"": "slow 0.05"})
        killed, survivor = world.start(trials=30), world.start(trials=30)
        wait_for(world.url, complete=6)
        killed.kill()
        killed.communicate()
        _, errors = survivor.communicate(timeout=120)
        assert survivor.returncode == 0, errors

        world.behave({})
        (record,) = world.run(trials=32)
        found = trials(world.url)
    assert record["measured"] == 32
    done = [t for t in found if t.state == TrialState.COMPLETE]
    owners = {t.user_attrs["owner"] for t in done}
    schedules = [t.user_attrs["schedule"] for t in done]
    assert len(owners) == 3  # both workers, and the one that went on
    assert len(set(schedules)) == len(schedules)
    assert TrialState.RUNNING not in {t.state for t in found if "owner" in t.user_attrs}
