"""Where nsagen finds its templates and specs, and where its user cache is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from nsagen.core.compiler_cache import REMEDY, VARIABLE, compiler_cache
from nsagen.core.errors import BuildError, InvalidInputError
from nsagen.core.files import check_writable, is_file

_log = logging.getLogger("nsagen.files")
_PACKAGE = Path(__file__).resolve().parents[1]


def _find(name: str) -> Path:
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def visible(paths: Iterable[Path]) -> list[Path]:
    """The given paths in order, except those whose name begins with a dot.

    Editors and file systems leave such files: locks, copies and attributes of others.
    """
    return sorted(path for path in paths if not path.name.startswith("."))


def working_folder() -> Path:
    """The working folder or, if it was removed, the place where the shell says that it was."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/", os.environ.get("PWD", ""))


def project_roots(path: Path) -> Iterator[Path]:
    """The folders above a path that are project roots, the innermost first."""
    for folder in path.parents:
        if is_file(folder / "pyproject.toml") or os.path.lexists(folder / ".git"):
            yield folder


def templates_dir() -> Path:
    """The folder of the templates, with one folder per op."""
    return _find("templates")


def specs_dir() -> Path:
    """The folder of the shipped specs."""
    return _find("specs")


def cache_dir() -> Path:
    """$NSAGEN_CACHE_DIR, or the platform's folder for caches of users.

    A user without a home, or with one that cannot be written, has one in the temporary folder.

    Raises:
        InvalidInputError: $NSAGEN_CACHE_DIR is in a home that does not exist.
    """
    chosen = os.environ.get("NSAGEN_CACHE_DIR")
    if chosen:
        try:
            return Path(chosen).expanduser()
        except RuntimeError:
            raise InvalidInputError(
                f"NSAGEN_CACHE_DIR: ~ must be the home of a user; got {chosen!r}, and there is no "
                "such home; give a path without ~"
            ) from None
    try:
        from platformdirs import user_cache_path
    except ImportError:
        user_cache_path = _user_cache_path
    try:
        folder = user_cache_path("nsagen")
    except RuntimeError:  # neither $HOME nor an entry among the system's users
        return _without_home()
    if not folder.is_absolute():  # older ones of platformdirs keep ~
        return _without_home()
    try:
        if not folder.is_dir():
            check_writable(folder)
    except OSError as error:
        return _instead_of(folder, error.strerror or str(error))
    return folder


def prepare_compiler_cache(command: str, *, will_write: bool = True) -> None:
    """Have a folder that Triton can write; call it before any work, and before workers start.

    One that the user chose is refused if it cannot be written. The one in a home that cannot be
    written is replaced, by $TRITON_CACHE_DIR of this process, with a line in the log.

    Args:
        command: for the error.
        will_write: whether kernels are sure to be compiled. Otherwise a folder that exists may be
            read-only, as it may have them all.

    Raises:
        BuildError: names the folder and the variable.
    """
    folder = compiler_cache()
    in_home = not (os.environ.get(VARIABLE) or os.environ.get("TRITON_HOME"))
    if not will_write and folder.is_dir():
        return
    try:
        if in_home and not folder.is_absolute():
            raise OSError(0, "the user has no home", str(folder))
        check_writable(folder)
        return
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
    if not in_home:
        raise BuildError(
            f"{command}: Triton's cache, {folder}, must be a folder that can be written; got "
            f"{why}; nothing was changed; {REMEDY}"
        )
    try:
        check_writable(cache_dir())
        other = cache_dir() / "triton"
    except (OSError, InvalidInputError):
        other = _without_home() / "triton"
    _log.warning(
        "Triton's cache is in %s because %s cannot be written (%s); set %s to choose another",
        other,
        folder,
        why,
        VARIABLE,
    )
    os.environ[VARIABLE] = str(other)


def _user_cache_path(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name


@functools.cache
def _instead_of(folder: Path, why: str) -> Path:
    found = _without_home()
    _log.warning(
        "the user cache is in %s because %s cannot be written (%s); "
        "set NSAGEN_CACHE_DIR to choose another",
        found,
        folder,
        why,
    )
    return found


@functools.cache
def _without_home() -> Path:
    """A folder that no other user can write to: kernels are imported from it."""
    folder = Path(tempfile.gettempdir(), f"nsagen-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if own and not found.st_mode & 0o022 else Path(tempfile.mkdtemp(prefix="nsagen-"))
