"""Where the user cache is, for users of every kind."""

from __future__ import annotations

import errno
import json
import os
import pwd
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsagen.cli.app import main
from nsagen.core import paths
from nsagen.core.compiler_cache import cache_error, compiler_cache
from nsagen.core.errors import BuildError, InvalidInputError
from nsagen.core.paths import cache_dir, prepare_compiler_cache

TRITONS = ("TRITON_CACHE_DIR", "TRITON_HOME")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user without a home, as in a container that runs with any number as its user."""

    def unknown(*_: object) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "NSAGEN_CACHE_DIR", "USER", "LOGNAME", *TRITONS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths._without_home.cache_clear()
    paths._instead_of.cache_clear()
    yield tmp_path
    paths._without_home.cache_clear()
    paths._instead_of.cache_clear()


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


@pytest.mark.parametrize("platformdirs", [True, False])
def test_a_home_that_cannot_be_written_is_as_good_as_none(
    no_home: Path,
    platformdirs: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not platformdirs:
        monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("HOME", "/dev/null")
    folder = cache_dir()
    assert folder.parent == no_home
    assert cache_dir() == folder
    (message,) = caplog.messages
    assert message.startswith(f"the user cache is in {folder} because /dev/null/.cache/nsagen")
    assert message.endswith("set NSAGEN_CACHE_DIR to choose another")


def test_doctor_finds_a_cache_that_cannot_be_written(
    no_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(no_home)
    monkeypatch.setenv("NSAGEN_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    said = capsys.readouterr().out
    assert "problem: the user cache, /dev/null/cache, cannot be written" in said
    assert "set NSAGEN_CACHE_DIR to a folder that can" in said


@pytest.mark.parametrize(
    "variables", [{"TRITON_HOME": "/dev/null"}, {"HOME": "/", "TRITON_CACHE_DIR": "/dev/null/x"}]
)
def test_compiling_without_room_for_tritons_cache_is_refused_before_a_byte_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="1"):
        main(["build", "tiny", "--compile"])
    assert "set TRITON_CACHE_DIR to a folder that can be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_chosen_folder_of_triton_that_cannot_be_written_is_refused_by_name(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_home / "file").touch()
    for name, folder in (("TRITON_CACHE_DIR", "file/a"), ("TRITON_HOME", "file")):
        monkeypatch.setenv(name, str(no_home / folder))
        with pytest.raises(BuildError, match=rf"tune: Triton's cache, {no_home}/file.*; got Not a"):
            prepare_compiler_cache("tune")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("home", [None, "file"])
@pytest.mark.parametrize("own", ["mine", "file", None])
def test_triton_has_a_cache_where_there_is_no_home(
    no_home: Path,
    home: str | None,
    own: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beside nsagen's own kernels or, if those cannot be kept either, in a temporary folder."""
    (no_home / "file").touch()
    if home is not None:
        monkeypatch.setenv("HOME", str(no_home / home))
    if own is not None:
        monkeypatch.setenv("NSAGEN_CACHE_DIR", str(no_home / own))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    prepare_compiler_cache("tune")
    chosen = compiler_cache()
    assert chosen.parent == (
        no_home / "mine" if own == "mine" else no_home / f"nsagen-{paths.os.getuid()}"
    )
    (line,) = [text for text in caplog.messages if text.startswith("Triton's cache is in")]
    assert line.endswith("set TRITON_CACHE_DIR to choose another")
    prepare_compiler_cache("tune")
    assert compiler_cache() == chosen


def test_a_folder_with_all_kernels_may_be_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "check_writable", refuse)
    prepare_compiler_cache("generate", will_write=False)
    with pytest.raises(BuildError, match="Read-only"):
        prepare_compiler_cache("tune")


def refuse(folder: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))


def test_an_error_of_triton_that_is_about_its_cache_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a" / "b"))
    for place in (tmp_path, tmp_path / "a" / "b" / "XYZ" / "k.json"):
        told = cache_error(PermissionError(errno.EACCES, "Permission denied", str(place)))
        assert str(told) == (
            f"Triton's cache, {tmp_path}/a/b, must be a folder that can be written; got "
            f"Permission denied: {place}; set TRITON_CACHE_DIR to a folder that can be written"
        )
    assert cache_error(FileNotFoundError(errno.ENOENT, "No such file", "/usr/bin/cc")) is None
    assert cache_error(OSError(errno.ENOSPC, "No space left")) is None
