"""Targets: the GPU architectures that kernels are generated for, and their limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nsagen.core.errors import SpecError
from nsagen.core.text import nearest


@dataclass(frozen=True, order=True)
class Target:
    """A GPU architecture.

    Attributes:
        backend: "cuda" or "hip".
        arch: "90" for compute capability 9.0; "gfx942" for AMD.
        shared_memory: bytes of shared memory that one program may use.
        num_sms: multiprocessors of the architecture's usual data-centre part.
        warp_size: threads a warp.
    """

    backend: str
    arch: str
    shared_memory: int
    num_sms: int
    warp_size: int = 32

    @property
    def has_wgmma(self) -> bool:
        """Warpgroup matrix instructions, which need tiles of at least 64 rows (Hopper)."""
        return self.backend == "cuda" and self.arch == "90"

    @property
    def has_tma(self) -> bool:
        """Bulk tensor copies between global and shared memory."""
        return self.backend == "cuda" and int(self.arch) >= 90

    def holds(self, cache_dtype: str) -> bool:
        """Whether kernels can convert to and from a cache's dtype; "" is the workload's own."""
        if cache_dtype == "float8_e4m3fn":
            return self.backend == "cuda" and int(self.arch) >= 89
        return True

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"


# Shared memory a program may use: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability" (maximum a block, after opting in); AMD CDNA3 ISA guide (LDS, 64 KiB).
KNOWN_TARGETS: dict[str, Target] = {
    str(target): target
    for target in (
        Target("cuda", "80", 163 * 1024, 108),
        Target("cuda", "86", 99 * 1024, 84),
        Target("cuda", "89", 99 * 1024, 128),
        Target("cuda", "90", 227 * 1024, 132),
        Target("cuda", "100", 227 * 1024, 148),
        Target("cuda", "120", 99 * 1024, 170),
        Target("hip", "gfx942", 64 * 1024, 304, warp_size=64),
    )
}


def parse_target(text: str) -> Target:
    """The target that a string such as `cuda:90` or `hip:gfx942` names.

    Raises:
        SpecError: the string names no known target; the text offers the nearest one.
    """
    if text in KNOWN_TARGETS:
        return KNOWN_TARGETS[text]
    remedy = nearest(re.sub(r"^(sm_?|cuda[-_ ]?)", "cuda:", text), KNOWN_TARGETS)
    raise SpecError(f"target: must be one of {', '.join(KNOWN_TARGETS)}; got {text!r}; {remedy}")
