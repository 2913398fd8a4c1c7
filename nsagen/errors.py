"""The exceptions of nsagen, where callers import them from; `nsagen` has all but two as well."""

from nsagen.core.errors import (
    BuildError,
    CapacityError,
    InvalidInputError,
    LostRankError,
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
    "LostRankError",
    "NsagenError",
    "SpecError",
    "TuneError",
    "UnsupportedWorkloadError",
    "WorkerError",
]
