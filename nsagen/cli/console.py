"""The terminal: consoles on stdout and stderr, and a progress bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nsagen.cli.verbosity import is_quiet
from nsagen.core.text import printable

WIDE = 200
"""Columns to lay out for where no terminal cuts them off."""


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; NO_COLOR is honoured by rich."""
    stream = sys.stderr if stderr else sys.stdout
    narrow = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, width=None if narrow else WIDE)


def print_line(text: str) -> None:
    """A line as it is: a path may look like markup or hold a tab, and its command is copied."""
    print(printable(text))


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, unless --quiet or no terminal; yields (what, how many, of how many)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        console=console(stderr=True),
        transient=True,
        disable=is_quiet() or not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(title, total=None, what="", visible=False)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, what=escape(what), visible=True)

        yield report
