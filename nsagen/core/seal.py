"""A last line that tells whether a generated file is whole.

A kernel cut off between two lines is often valid Python that launches nothing. Packages have a
manifest against that; a file of the user cache stands alone and carries its own hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_MARK = "# sha256 of the lines above: "


def sealed(text: str) -> str:
    """The text with a last line that holds its hash."""
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_whole(path: Path) -> bool:
    """Whether a file can be read and ends with the hash of what it holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    body, mark, _ = text.rpartition(_MARK)
    return bool(mark) and text == sealed(body)
