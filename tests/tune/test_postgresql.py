"""Several workers on one study in a real database, one of them killed in the midst of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tune import postgresql
from tests.tune.postgresql import server
from tests.tune.test_interruption import World
from tests.tune.two_workers import check_two_workers


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
        check_two_workers(world)
