"""The static cost model: ranks schedules by what their binaries use, without a GPU.

The cost of a schedule is the sum over its kernels of

    spills * matrix * latency * waves

    spills   1 + spilled bytes a thread / 64: each spill is a round trip to local memory
    matrix   1 for the target's widest matrix instruction, 1.5 for mma.sync where wgmma or
             tcgen05 exists, 4 for no matrix instruction
    latency  1 + 8 / (resident warps * loads in flight): little to switch to while loads arrive
    waves    the last wave of programs runs as long as a full one: ceil(w) / w

where registers, shared memory and threads of a multiprocessor limit the resident programs. If
any kernel has matrix instructions, only those with them count: the others prepare or add up, once,
what those work on. The cost has no unit and predicts no time: it says which of two binaries looks
healthier. So the default, which a person chose with more knowledge, gives way only to a clearly
lower cost, and a measured record always goes before a ranked one. A measured search uses the cost
only as an order: the healthiest of the compiled schedules goes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nsagen.core.target import Target

_REGISTERS = 64 * 1024
_RESERVED_SHARED = 1024
_MOST_PROGRAMS = 32


def static_cost(kernels: Sequence[Mapping[str, Any]], target: Target) -> float:
    """The cost of a schedule from its kernels' resources; see the module's docstring."""
    main = [kernel for kernel in kernels if kernel["matrix"] != "none"]
    return sum(_kernel_cost(kernel, target) for kernel in main or kernels)


def resident_programs(kernel: Mapping[str, Any], target: Target) -> int:
    """Programs of a kernel that a multiprocessor holds at a time; at least one."""
    threads = target.warp_size * int(kernel["num_warps"])
    registers = -(-max(1, int(kernel["registers"])) // 8) * 8 * threads
    shared = int(kernel["shared_bytes"]) + _RESERVED_SHARED
    most_threads = 2048 if target.arch in ("80", "90", "100") or target.backend == "hip" else 1536
    return max(
        1,
        min(
            _REGISTERS // registers,
            (target.shared_memory + _RESERVED_SHARED) // shared,
            most_threads // threads,
            _MOST_PROGRAMS,
        ),
    )


def _kernel_cost(kernel: Mapping[str, Any], target: Target) -> float:
    resident = resident_programs(kernel, target)
    spills = 1 + int(kernel["spill_bytes"]) / 64
    newer = target.backend == "cuda" and int(target.arch) in (90, 100)
    matrix = {"none": 4.0, "mma.sync": 1.5 if newer else 1.0}.get(kernel["matrix"], 1.0)
    in_flight = max(1, int(kernel["num_stages"]) - 1)
    latency = 1 + 8 / (resident * int(kernel["num_warps"]) * in_flight)
    waves = int(kernel["programs"]) / (target.num_sms * resident)
    return spills * matrix * latency * math.ceil(waves) / waves
