"""What a compiled kernel uses: registers, spills, shared memory and matrix instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nsagen.aot.cubin import cubin_usage
from nsagen.aot.machine_code import gcn_stack_traffic_in_loops, stack_traffic_in_loops
from nsagen.core.target import Target

# The widest matrix instruction found names the kernel's path, best first.
_PTX_MATRIX = (("tcgen05.mma", "tcgen05"), ("wgmma.mma_async", "wgmma"), ("mma.sync", "mma.sync"))


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel on one target.

    Attributes:
        registers: 32-bit registers per thread.
        spill_bytes: stack bytes per thread (local memory).
        shared_bytes: shared memory per program, static and dynamic.
        matrix: the matrix instruction used: "wgmma", "mma.sync", "tcgen05", "mfma" or "none".
        loop_spills: loads and stores of the stack that lie in loops, counted in the machine code.
    """

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str
    loop_spills: int = 0

    def problems(self, target: Target, *, measured: bool = False) -> list[str]:
        """Why this kernel must not ship for the target; empty if it may.

        Args:
            measured: whether the schedule won by measurement; its loops may then spill.
        """
        found = []
        if not measured and self.loop_spills:
            found.append(
                f"loads or stores the stack {self.loop_spills} times in loops "
                f"({self.spill_bytes} bytes a thread); a default must not"
            )
        if self.shared_bytes > target.shared_memory:
            limit = target.shared_memory
            found.append(f"needs {self.shared_bytes} bytes of shared memory (limit {limit})")
        return found


def read_resources(kernel: str, compiled: Any, target: Target) -> Resources:
    """Read a compiled kernel's resources from its binary.

    Raises:
        BuildError: the binary has an unknown format.
    """
    if target.backend == "hip":
        return _read_amd(kernel, compiled, target)
    return _read_nvidia(kernel, compiled, target)


def _read_nvidia(kernel: str, compiled: Any, target: Target) -> Resources:
    registers, stack = cubin_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        kernel=kernel,
        target=str(target),
        registers=registers,
        spill_bytes=stack,
        shared_bytes=int(compiled.metadata.shared),
        matrix=next((name for word, name in _PTX_MATRIX if word in ptx), "none"),
        loop_spills=stack_traffic_in_loops(compiled.asm["cubin"]) if stack else 0,
    )


def _read_amd(kernel: str, compiled: Any, target: Target) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    stack = number("private_segment_fixed_size")
    return Resources(
        kernel=kernel,
        target=str(target),
        registers=number("vgpr_count"),
        spill_bytes=stack,
        shared_bytes=int(compiled.metadata.shared),
        matrix="mfma" if "v_mfma" in text else "none",
        loop_spills=gcn_stack_traffic_in_loops(text) if stack else 0,
    )
