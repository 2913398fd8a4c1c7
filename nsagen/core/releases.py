"""Releases of Triton: the installed one, and the range with which an algorithm is known to run."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from nsagen.core.installed import own_triton_version

Release = tuple[int, int]
"""(major, minor)."""


@dataclass(frozen=True)
class Releases:
    """The releases of Triton from `first` to `last`, both inclusive."""

    first: Release
    last: Release

    def __contains__(self, release: Release) -> bool:
        return self.first <= release <= self.last

    def __str__(self) -> str:
        return " to ".join(".".join(map(str, release)) for release in (self.first, self.last))


@functools.cache
def installed_release() -> Release | None:
    """The release of Triton that this process imports; None without Triton, or for an odd one.

    It does not import Triton, which takes a second.
    """
    found = re.match(r"(\d+)\.(\d+)", own_triton_version() or "")
    return (int(found[1]), int(found[2])) if found else None
