"""The exceptions of nsagen, where callers import them from; `nsagen` has all but one as well."""

from nsagen.core.errors import (
    BuildError,
    CapacityError,
    InvalidInputError,
    NsagenError,
    SpecError,
    TuneError,
    UnsupportedWorkloadError,
    WorkerError,
)

__all__ = [
    "BuildError",
    "CapacityError",
    "InvalidInputError",
    "NsagenError",
    "SpecError",
    "TuneError",
    "UnsupportedWorkloadError",
    "WorkerError",
]
