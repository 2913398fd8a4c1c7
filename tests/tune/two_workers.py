"""Two workers on one study in a storage that they share, one of them killed in the midst of it."""

from __future__ import annotations

import time

import optuna
from optuna.trial import FrozenTrial, TrialState

from nsagen.tune.storage import open_storage
from tests.tune.test_interruption import World


def trials(url: str) -> list[FrozenTrial]:
    storage = open_storage(url)
    names = optuna.get_all_study_names(storage)
    return [t for n in names for t in optuna.load_study(study_name=n, storage=storage).trials]


def owners_of(found: list[FrozenTrial]) -> list[str]:
    """Who completed each trial."""
    return [t.user_attrs["owner"] for t in found if t.state == TrialState.COMPLETE]


def wait_for(url: str, complete: int, owners: int) -> None:
    """Wait for so many trials, of so many workers: one may start seconds after the other."""
    end = time.monotonic() + 120
    while len(done := owners_of(trials(url))) < complete or len(set(done)) < owners:
        assert time.monotonic() < end, "the workers do not get on"
        time.sleep(0.2)


def check_two_workers(world: World) -> None:
    """Both work at `world.url`, one dies, and a third goes on from what they left."""
    world.behave({"": "slow 0.1"})
    killed, survivor = world.start(trials=18), world.start(trials=18)
    wait_for(world.url, complete=6, owners=2)
    killed.kill()
    killed.communicate()
    _, errors = survivor.communicate(timeout=120)
    assert survivor.returncode == 0, errors

    world.behave({})
    (record,) = world.run(trials=22)
    found = trials(world.url)
    assert record["measured"] == 22
    done = [t for t in found if t.state == TrialState.COMPLETE]
    schedules = [t.user_attrs["schedule"] for t in done]
    assert len(set(owners_of(found))) == 3  # both workers, and the one that went on
    assert len(set(schedules)) == len(schedules)
    assert TrialState.RUNNING not in {t.state for t in found if "owner" in t.user_attrs}
