"""Generates, tunes and dispatches Triton kernels for Native Sparse Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsagen.core.errors import (
    BuildError,
    CapacityError,
    InvalidInputError,
    NsagenError,
    SpecError,
    TuneError,
    UnsupportedWorkloadError,
)
from nsagen.core.version import __version__

if TYPE_CHECKING:
    from nsagen.runtime.dispatcher import Dispatcher, OnMissing

__all__ = [
    "BuildError",
    "CapacityError",
    "InvalidInputError",
    "NsagenError",
    "SpecError",
    "TuneError",
    "UnsupportedWorkloadError",
    "__version__",
    "load",
]


def load(name: str, on_missing: OnMissing = "build") -> Dispatcher:
    """The dispatcher of the package that `nsagen build` made from the spec `name`.

    Args:
        name: of the spec, e.g. "llama8b".
        on_missing: "build" builds what a call needs and the package lacks, into the user
            cache; "error" raises `UnsupportedWorkloadError`.

    Raises:
        InvalidInputError: no such package is found.
    """
    from nsagen.core.importing import complete_before_forks

    with complete_before_forks():
        # The package, not its module: two threads that import both in different orders deadlock.
        from nsagen.runtime import load as load_package

        return load_package(name, on_missing)
