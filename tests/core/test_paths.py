"""Where the user cache is, for users of every kind."""

from __future__ import annotations

import json
import pwd
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsagen.cli.app import main
from nsagen.core import paths
from nsagen.core.errors import InvalidInputError
from nsagen.core.paths import cache_dir


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user without a home, as in a container that runs with any number as its user."""

    def unknown(*_: object) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "NSAGEN_CACHE_DIR", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths._without_home.cache_clear()
    yield tmp_path
    paths._without_home.cache_clear()


@pytest.mark.parametrize("platformdirs", [True, False])
def test_a_user_without_a_home_has_a_cache(
    no_home: Path, platformdirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not platformdirs:
        monkeypatch.setitem(sys.modules, "platformdirs", None)
    folder = cache_dir()
    assert folder.parent == no_home
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_dir() == folder


@pytest.mark.parametrize("kind", ["open", "link"])
def test_a_folder_that_others_can_write_to_is_no_cache(no_home: Path, kind: str) -> None:
    """Kernels are imported from it."""
    taken = no_home / f"nsagen-{paths.os.getuid()}"
    if kind == "link":
        (no_home / "theirs").mkdir()
        taken.symlink_to(no_home / "theirs")
    else:
        taken.mkdir()
        taken.chmod(0o777)
    folder = cache_dir()
    assert folder.parent == no_home
    assert folder != taken
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_commands_work_without_a_home(
    no_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(no_home)
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["user cache"].startswith(str(cache_dir()))


def test_a_home_that_is_not_there_is_refused_by_name(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", "~/kernels")
    with pytest.raises(InvalidInputError, match="NSAGEN_CACHE_DIR: ~ must be the home of a user"):
        cache_dir()
