"""Imports Python files from their paths."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from nsagen.core.errors import BuildError

LOCK = threading.RLock()
"""Held while a package, a kernel or a dispatcher is looked up and, if needed, made.

One lock for all, because each may need another: a package's module makes a dispatcher.
"""

_importers: list[int] = []
"""Threads inside `complete_before_forks`; LOCK guards it."""

_fewer_importers = threading.Condition(LOCK)

_PATIENCE_S = 10.0
"""How long a fork waits for other threads' imports, which may be waiting for the forking thread."""


@contextmanager
def complete_before_forks() -> Iterator[None]:
    """Imports inside are complete, or not begun, when another thread forks.

    Python has one lock for each module that is being imported. A child forked meanwhile would wait
    forever for a thread that it does not have. LOCK cannot be held instead: another thread may hold
    a module's lock and wait for LOCK, as a package's module makes a dispatcher.
    """
    me = threading.get_ident()
    with LOCK:
        _importers.append(me)
    try:
        yield
    finally:
        with LOCK:
            _importers.remove(me)
            _fewer_importers.notify_all()


def _before_fork() -> None:
    me = threading.get_ident()
    LOCK.acquire()
    _fewer_importers.wait_for(lambda: all(one == me for one in _importers), _PATIENCE_S)


def _in_child() -> None:
    me = threading.get_ident()
    _importers[:] = [one for one in _importers if one == me]
    LOCK.release()


# A child that was forked while another thread holds LOCK would wait for it forever.
os.register_at_fork(before=_before_fork, after_in_parent=LOCK.release, after_in_child=_in_child)


def import_file(path: Path) -> ModuleType:
    """A new module made from a file each time; `sys.modules` does not get it.

    Raises:
        BuildError: not a Python file.
    """
    return _executed(path, path.stem)


def import_once(path: Path, prefix: str) -> ModuleType:
    """The module of a file, or the package of an `__init__.py`, made once a process.

    Other threads wait until it is complete.

    Args:
        prefix: of its name in `sys.modules`; a hash of the path follows, as several folders may
            have files of one name.

    Raises:
        BuildError: not a Python file.
    """
    path = path.absolute()
    is_package = path.name == "__init__.py"
    stem = path.parent.name if is_package else path.stem
    place = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    name = f"{prefix}{place}_{stem}"
    with LOCK:
        known = sys.modules.get(name)
        return _executed(path, name, register=True) if known is None else known


def _executed(path: Path, name: str, *, register: bool = False) -> ModuleType:
    folders = [str(path.parent)] if path.name == "__init__.py" else None
    module_spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=folders
    )
    if module_spec is None or module_spec.loader is None:
        raise BuildError(f"{path}: must be a Python file; it cannot be imported; delete it")
    module = importlib.util.module_from_spec(module_spec)
    if register:
        sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        if register:  # with the modules of a package that it had imported
            for one in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[one]
        raise
    return module
