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
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nsagen.core.errors import InvalidInputError

TEMPORARY = ".nsagen-*.tmp"
"""Pattern for names of files being written; a killed process leaves one behind."""

_log = logging.getLogger("nsagen.files")
_MARK = "# sha256 of the lines above: "
_HEAD_BYTES = 4096


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
    the file that it leads to is replaced.

    Raises:
        OSError: nothing can be written there, or links lead in a circle.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    before, _, after = TEMPORARY.partition("*")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=before, suffix=after)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with contextlib.suppress(OSError):  # some file systems have no modes
            os.chmod(temporary, 0o644)
        _forget_bytecode(path)
        _put(name, path)
        _forget_bytecode(path)  # from a process that imported the old file in between
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file could be written; call it before long work. Makes nothing.

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


def check_own(path: Path, mark: re.Pattern[bytes], what: str, remedy: str) -> None:
    """Refuse to replace a file that nsagen did not write; call it before any work.

    A missing or empty file is free, and so is anything that is not a file, such as /dev/stdout.

    Args:
        mark: matches the start of what nsagen writes there.
        what: nsagen writes there, for the error.
        remedy: the rest of the error, after "move it away, or".

    Raises:
        InvalidInputError: names the file.
        OSError: it cannot be read, or is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head and not mark.search(head):
        raise InvalidInputError(
            f"{path}: must be a new file or {what} that nsagen wrote; got another file; "
            f"nothing was changed; move it away, or {remedy}"
        )


def _put(temporary: str, path: Path) -> None:
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
    with _held(_open_lock(lock_path(folder, name)), folder / name):
        yield


def lock_path(folder: Path, name: str) -> Path:
    """The file of the lock that `locked` takes; it stays when the lock is released."""
    return folder / f".{name}.lock"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time write a folder, without leaving a lock file in it."""
    with _held(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), folder):
        yield


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
    """Open a lock's file, for writing if that is allowed: it may be another user's."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def sealed(text: str) -> str:
    """The text with a last line that holds its hash.

    A kernel cut off between two lines is often valid Python that launches nothing. A package's
    manifest protects against that; a file of the user cache stands alone and carries its own hash.
    """
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_whole(path: Path) -> bool:
    """Whether a file can be read and ends with the hash of its content."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    body, mark, _ = text.rpartition(_MARK)
    return bool(mark) and text == sealed(body)
