"""Files that appear whole or not at all, seals that reveal a damaged one, and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nsagen.core.errors import InvalidInputError

TEMPORARY = ".nsagen-*.tmp"
"""Pattern for names of files being written; a killed process leaves one behind."""

_log = logging.getLogger("nsagen.files")
_OWNER = ".owner"
_MARK = "# sha256 of the lines above: "
_HEAD_BYTES = 4096
_REOPENED = 1000
"""How often a lock is opened again at most: some file systems cannot tell two files apart."""


def replace_file(path: Path, content: str | bytes) -> bool:
    """Write a file in one step unless it already has the content; returns whether it changed."""
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file for the block to write, which then takes the path's place in one step.

    If the block raises, the temporary file is removed and the path is as it was. A link stays:
    the file that it leads to is replaced. A pipe or device stays too, and gets the content. The
    file's mode stays; a new one's follows the umask.

    Raises:
        OSError: nothing can be written there, or links lead in a circle.
    """
    path = _followed(path)
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory(prefix="nsagen-") as folder:
            temporary = Path(folder, path.name)
            yield temporary
            _send(temporary.read_bytes(), path)
        return
    temporary = _temporary(path.parent)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        yield temporary
        with contextlib.suppress(OSError):  # no file yet, or a file system without modes
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        _forget_bytecode(path)
        _put(temporary, path)
        _forget_bytecode(path)  # from a process that imported the old file in between
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (str(temporary), temporary, None):
            error.filename, error.filename2 = str(path), None  # what the user knows
        raise


def _temporary(folder: Path) -> Path:
    before, _, after = TEMPORARY.partition("*")
    return folder / f"{before}{secrets.token_hex(4)}{after}"


def _followed(path: Path) -> Path:
    """The place that a path means, where links lead; a link to a pipe or device is one itself.

    Raises:
        OSError: links lead in a circle.
    """
    if path.is_symlink() and (path.is_file() or not path.exists()):
        path = Path(os.path.realpath(path))
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return path


def _send(data: bytes, path: Path) -> None:
    """Write to a pipe or device; a pipe that nothing reads is an error, as waiting may not end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(data)


def check_replaceable(path: Path) -> None:
    """Refuse a path at which `replace_file` would fail; call it before any work. Makes nothing.

    Raises:
        OSError: a folder is there, or links lead nowhere, or the folder cannot be written.
    """
    place = _followed(path)
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if place is not path and not place.parent.is_dir():  # of a link, which nsagen did not make
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))
    if place.is_file() or not place.exists():
        check_writable(place.parent)
    elif not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def is_file(path: Path) -> bool:
    """Whether a path is a regular file that can be reached; False for an impossible path."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be read
        return False


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file could be written; call it before long work. Leaves nothing.

    Modes do not tell: root may write everywhere, yet /proc takes no files and a disk may be full.

    Raises:
        OSError: names the first folder above that is not one or cannot be written.
    """
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    code = 0
    if not place.is_dir():
        code = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
    if code:
        raise OSError(code, os.strerror(code), str(place))
    probe = _temporary(place)
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        # /proc says that there is no such file, as if it could be made.
        code = errno.EACCES if error.errno == errno.ENOENT else error.errno or errno.EACCES
        raise OSError(code, os.strerror(code), str(place)) from None
    with contextlib.suppress(OSError):
        probe.unlink()


def check_own(path: Path, mark: re.Pattern[bytes], what: str, remedy: str) -> None:
    """Refuse a path where `replace_file` would fail, or replace a file that nsagen did not write.

    Call it before any work. A missing or empty file is free, and so is a pipe or a device such as
    /dev/stdout.

    Args:
        mark: matches the start of what nsagen writes there.
        what: nsagen writes there, for the error.
        remedy: the rest of the error, after "move it away, or".

    Raises:
        InvalidInputError: names the file.
        OSError: it cannot be read or written, or is a folder.
    """
    check_replaceable(path)
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head and not mark.search(head):
        raise InvalidInputError(
            f"{path}: must be a new file or {what} that nsagen wrote; got another file; "
            f"nothing was changed; move it away, or {remedy}"
        )


def _put(temporary: Path, path: Path) -> None:
    """Rename a file over another, or in two steps where the file system cannot."""
    try:
        os.replace(temporary, path)
    except (FileExistsError, PermissionError):
        if not path.is_file():
            raise
        path.unlink()
        shutil.move(temporary, path)


def _forget_bytecode(path: Path) -> None:
    """Remove Python's bytecode of a module, beside it or where PYTHONPYCACHEPREFIX says.

    Python tells versions apart by size and by the second of their time. Another version of the same
    size, made within a second or after the clock was set back, would not be read.
    """
    if path.suffix != ".py":
        return
    folders = {path.parent / "__pycache__"}
    with contextlib.suppress(NotImplementedError):  # this Python keeps none
        folders.add(Path(importlib.util.cache_from_source(str(path.absolute()))).parent)
    for folder in folders:
        for compiled in folder.glob(f"{path.stem}.*.pyc"):
            with contextlib.suppress(OSError):
                compiled.unlink()


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time do what `name` stands for in a folder; a second one waits.

    On file systems without locks it continues without one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = lock_path(folder, name)
    for left in reversed(range(_REOPENED)):
        lock = _open_lock(path)
        with _held(lock, folder / name):
            if left and not _is_at(path, lock):  # the process before removed it meanwhile
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if not os.fstat(lock).st_size:  # otherwise it is a file of the user's
                        path.unlink()
            return


def lock_path(folder: Path, name: str) -> Path:
    """The file of the lock that `locked` takes; it goes when the lock is released."""
    return folder / f".{name}.lock"


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time write a folder, without leaving a lock file in it."""
    with _held(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), folder):
        yield


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A temporary folder that goes with the block. First go those that killed processes left.

    Its process holds a lock in it for as long as it lives. On file systems without locks, and of
    earlier versions, what was left stays.
    """
    prefix = f"nsagen-{name}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_OWNER}"):
        with contextlib.suppress(OSError):  # another user's, or of a process that lives
            owner = os.open(left, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent, ignore_errors=True)
            finally:
                os.close(owner)
    with tempfile.TemporaryDirectory(prefix=prefix) as made:
        folder = Path(made)
        owner = os.open(folder / f"{_OWNER}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with _held(owner, folder):
            os.rename(folder / f"{_OWNER}.new", folder / _OWNER)  # has its lock from the start
            yield folder


@contextmanager
def _held(lock: int, what: Path) -> Iterator[None]:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that writes %s", what)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(lock)


def _open_lock(path: Path) -> int:
    """Open a lock's file, for writing if that is allowed: it may be another user's.

    A link is refused: it could have the file made anywhere.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)


def sealed(text: str) -> str:
    """The text with a last line that holds its hash.

    A kernel cut off between two lines is often valid Python that launches nothing. A package's
    manifest protects against that; a file of the user cache stands alone and carries its own hash.
    """
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_whole(path: Path) -> bool:
    """Whether a file can be read and ends with the hash of its content."""
    try:
        text = path.read_text(encoding="utf-8") if is_file(path) else ""
    except (OSError, ValueError):
        return False
    body, mark, _ = text.rpartition(_MARK)
    return bool(mark) and text == sealed(body)
