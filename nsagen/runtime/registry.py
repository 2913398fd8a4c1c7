"""Dispatchers by key. A custom op carries a dispatcher as text; here the text is resolved.

The registry only grows: a compiled graph may hold a key for as long as the process lives.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from nsagen.core.errors import InvalidInputError
from nsagen.core.importing import LOCK

if TYPE_CHECKING:
    from nsagen.runtime.dispatcher import Dispatcher

DEFAULT = ""
"""The key of the default dispatcher: an empty table that builds whatever a call needs."""

_dispatchers: dict[str, Dispatcher] = {}


def register(dispatcher: Dispatcher, key: str) -> str:
    """Keep a dispatcher under `key`, or under `key#2`, `key#3`, ... when that is taken.

    The key of a process's first dispatcher of a name is the name alone, and so the same in
    every process: exported graphs rely on it.
    """
    with LOCK:
        free, number = key, 1
        while free in _dispatchers or free == DEFAULT:
            number += 1
            free = f"{key}#{number}"
        _dispatchers[free] = dispatcher
        return free


def lookup(key: str) -> Dispatcher:
    """The dispatcher that is registered under `key`.

    Raises:
        InvalidInputError: no dispatcher has that key in this process.
    """
    found = _dispatchers.get(key)
    if found is not None:
        return found
    if key == DEFAULT:
        return default_dispatcher()
    name = key.partition("#")[0].partition(":")[0]
    raise InvalidInputError(
        f"dispatcher: must be registered in this process; got {key!r}; "
        f"known: {', '.join(filter(None, _dispatchers)) or 'none'}; "
        f'call nsagen.load("{name}") first'
    )


def default_dispatcher() -> Dispatcher:
    """The dispatcher of calls that name none."""
    with LOCK:
        return _default()


@functools.cache
def _default() -> Dispatcher:
    from nsagen.runtime.dispatcher import Dispatcher

    return Dispatcher(name="default", package="", table={})
