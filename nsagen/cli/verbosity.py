"""--quiet and --verbose: what the logger tree `nsagen` shows on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

FLAGS = ("--quiet", "-q", "--verbose", "-v")


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def configure(*, quiet: bool, verbose: bool) -> None:
    """Errors only; or notes as well; or everything, with time and logger."""
    logger = logging.getLogger("nsagen")
    for handler in [h for h in logger.handlers if isinstance(h, _Stderr)]:
        logger.removeHandler(handler)
    handler = _Stderr()
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(message)s"
    handler.setFormatter(logging.Formatter(text, "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


def is_quiet() -> bool:
    """Whether --quiet was given: no progress bars and no notes."""
    return not logging.getLogger("nsagen").isEnabledFor(logging.WARNING)


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments, with --quiet and --verbose before the command: they go anywhere."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before, rest = arguments[:end], arguments[end:]
    flags = [a for a in before if a in FLAGS]
    return flags + [a for a in before if a not in FLAGS] + list(rest)
