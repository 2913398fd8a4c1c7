"""A device's names: its target for tables, its slug for tuning records."""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING

from nsagen.core.errors import UnsupportedWorkloadError

if TYPE_CHECKING:
    import torch

INTERPRETED_TARGET = "cuda:80"
"""An interpreted CPU call uses this target's default schedule if the table has no kernel."""


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors."""
    # As Triton reads it, which may not be imported for this.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def target_of(device: torch.device) -> str:
    """The target of a device: "cuda:90" for compute capability 9.0, "hip:gfx942" on ROCm.

    Raises:
        UnsupportedWorkloadError: the device is not a GPU that Triton compiles for.
    """
    if device.type != "cuda":
        raise UnsupportedWorkloadError(
            f"dispatcher: kernels run on cuda devices; got {device}; "
            "move the tensors to a GPU, or to the CPU for the reference"
        )
    return _target_of_index(_index(device))


def device_slug(device: torch.device | None = None) -> str:
    """The device's name as files use it, e.g. `nvidia-h200`; the current GPU by default."""
    return _slug_of_index(_index(device))


def _index(device: torch.device | None) -> int:
    import torch

    return torch.cuda.current_device() if device is None or device.index is None else device.index


@functools.cache
def _target_of_index(index: int) -> str:
    import torch

    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName
        return f"hip:{name.split(':')[0]}"  # drops features such as ":sramecc+:xnack-"
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda:{major}{minor}"


@functools.cache
def _slug_of_index(index: int) -> str:
    import torch

    return slug(torch.cuda.get_device_name(index))


def slug(name: str) -> str:
    """Lower case, with every run of characters other than letters and digits as one dash."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
