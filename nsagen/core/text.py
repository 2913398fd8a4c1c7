"""Text that a terminal or a shell takes as it is meant, whatever characters a path has."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable

_BYTES = {b: chr(b) for b in range(0x20, 0x7F)} | {0x27: "\\'", 0x5C: "\\\\"}

_KEYS = 4
"""Most keys that a text names."""

_KEY = 40
"""Most characters of each."""


def printable(text: str) -> str:
    """The text with an escape for each character that could control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(count: int, noun: str) -> str:
    """A number of things, by a noun that takes an s where there is not exactly one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def nearest(word: str, known: Iterable[str], otherwise: str = "choose one") -> str:
    """`did you mean 'topk'?` where a known word is near, or what to do otherwise."""
    near = difflib.get_close_matches(word.lower().replace("-", "_"), list(known), 1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def shown_keys(keys: Iterable[object]) -> str:
    """Some keys of a file as text for a line of a log: the first few, sorted."""
    names = sorted(printable(str(key))[:_KEY] for key in keys)
    more = f" and {len(names) - _KEYS} more" if len(names) > _KEYS else ""
    return ", ".join(names[:_KEYS]) + more


def shell_text(words: Iterable[str]) -> str:
    """A command of these words for a shell, printable and on one line."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(_BYTES.get(b, f"\\x{b:02x}") for b in os.fsencode(word)) + "'"
