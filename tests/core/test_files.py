"""Files that appear whole, on file systems of every kind."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nsagen.core.errors import InvalidInputError
from nsagen.core.files import (
    check_own,
    check_replaceable,
    check_writable,
    lock_path,
    locked,
    replace_file,
    scratch_folder,
)
from nsagen.core.paths import visible


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_no_mode_need_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS, FAT and some FUSE mounts have none."""
    monkeypatch.setattr(os, "chmod", refuse)
    assert replace_file(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_nothing_can_be_renamed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "replace", refuse)
    assert replace_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "folder", "new")


@pytest.mark.parametrize("prefix", [False, True])
def test_bytecode_of_the_old_file_goes_wherever_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: bool
) -> None:
    from importlib.util import cache_from_source

    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "elsewhere") if prefix else None)
    kept = Path(cache_from_source(str(tmp_path / "a.py")))
    kept.parent.mkdir(parents=True)
    kept.touch()
    replace_file(tmp_path / "a.py", "x = 1\n")
    assert not kept.exists()


def test_a_file_system_without_locks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with locked(tmp_path, "few"):
        pass


def test_waiting_for_a_lock_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited = []

    def held(lock: int, how: int) -> None:
        if how & fcntl.LOCK_NB:
            raise BlockingIOError
        waited.append(lock)

    monkeypatch.setattr(fcntl, "flock", held)
    with locked(tmp_path, "few"):
        assert waited
    assert caplog.messages == [f"waiting for another process that writes {tmp_path / 'few'}"]


def test_a_folder_that_cannot_be_written_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "file/a", "dangling/a"):
        with pytest.raises(NotADirectoryError) as error:
            check_writable(tmp_path / name)
        assert error.value.filename == str(tmp_path / name.partition("/")[0])
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError):
        check_writable(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yaml", "._a.yaml"):
        (tmp_path / name).touch()
    (tmp_path / ".#b.yaml").symlink_to("me@host.1:1")
    assert [path.name for path in visible(tmp_path.glob("*.yaml"))] == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize("content", [None, b"", b"ours\n"])
def test_a_file_that_nsagen_wrote_may_be_replaced(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "page"
    if content is not None:
        path.write_bytes(content)
    check_own(path, re.compile(rb"\Aours"), "a page", "choose another")
    check_own(Path(os.devnull), re.compile(rb"\Aours"), "a page", "choose another")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "[my] page"
    path.write_bytes(b"\xff mine, not ours")
    with pytest.raises(InvalidInputError, match=r"\[my\] page: must be a new file or a page"):
        check_own(path, re.compile(rb"\Aours"), "a page", "choose another")
    with pytest.raises(IsADirectoryError):
        check_own(tmp_path, re.compile(rb"\Aours"), "a page", "choose another")


def test_modes_are_kept_and_new_ones_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        replace_file(tmp_path / "new", "1")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
        (tmp_path / "new").chmod(0o640)
        replace_file(tmp_path / "new", "2")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_pipe_gets_the_content_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_replaceable(pipe)
    with pytest.raises(OSError, match="No such device"):  # nothing reads: it does not wait
        replace_file(pipe, "x")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(pipe, "content")
    assert os.read(reader, 99) == b"content"
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{reader}")  # as /dev/stdout is one
    check_replaceable(tmp_path / "link")
    replace_file(tmp_path / "link", "more")
    assert os.read(reader, 99) == b"more"
    (tmp_path / "link").unlink()
    os.close(reader)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_cannot_be_replaced_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "a")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "good").symlink_to("new")
    for name, kind in {
        "folder": IsADirectoryError,
        "file/a": NotADirectoryError,
        "lost": FileNotFoundError,
        "circle": OSError,
    }.items():
        with pytest.raises(kind):
            check_replaceable(tmp_path / name)
        with pytest.raises(OSError, match=r"\[Errno"):
            replace_file(tmp_path / name, "x")
    check_replaceable(tmp_path / "good")
    replace_file(tmp_path / "good", "x")
    assert (tmp_path / "good").is_symlink()
    assert (tmp_path / "new").read_text() == "x"


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "a")
    with pytest.raises(FileNotFoundError) as error:
        replace_file(tmp_path / "lost", "x")
    assert error.value.filename == str(tmp_path / "nowhere" / "a")


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    lock_path(tmp_path, "few").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path, "few"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_leaves_no_file(tmp_path: Path) -> None:
    with locked(tmp_path, "few"):
        assert lock_path(tmp_path, "few").is_file()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_removed_while_others_wait_stays_exclusive(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(25):
            with locked(tmp_path, "few"):
                inside.append(number)
                time.sleep(0.0005)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 100
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_tell_files_apart_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with locked(tmp_path, "few"):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_takes_no_files_is_refused_whatever_its_mode(tmp_path: Path) -> None:
    """Root may write everywhere, by the modes."""
    for folder in ("/proc", "/proc/nope/deeper"):
        with pytest.raises(PermissionError) as error:
            check_writable(Path(folder))
        assert error.value.filename == "/proc"
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_removes_what_killed_processes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("nsagen-tune-killed", "nsagen-tune-unowned", "nsagen-verify-killed"):
        (tmp_path / name / "kernels").mkdir(parents=True)
    for name in ("nsagen-tune-killed", "nsagen-verify-killed"):
        (tmp_path / name / ".owner").touch()  # whose lock ended with its process
    with scratch_folder("tune") as first, scratch_folder("tune") as second:
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"nsagen-tune-unowned", "nsagen-verify-killed", first.name, second.name}
    assert {path.name for path in tmp_path.iterdir()} == {
        "nsagen-tune-unowned",  # of a version that takes no lock: its process may live
        "nsagen-verify-killed",
    }
