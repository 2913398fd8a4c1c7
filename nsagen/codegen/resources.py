"""What a compiled kernel uses: registers, spills, shared memory and matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from nsagen.codegen.target import Target
from nsagen.errors import BuildError

MAX_SPILL_BYTES = 128
"""Stack bytes a thread above which a variant counts as spilling badly."""

# The widest matrix instruction found names the kernel's path, best first.
_SASS_MATRIX = (("UTC", "tcgen05"), ("HGMMA", "wgmma"), ("QGMMA", "wgmma"), ("HMMA", "mma.sync"))


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel on one target.

    Attributes:
        registers: 32-bit registers a thread.
        spill_bytes: stack bytes a thread (local memory).
        shared_bytes: shared memory a program, static and dynamic.
        matrix: the matrix instruction used: "wgmma", "mma.sync", "tcgen05", "mfma" or "none".
    """

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str

    def problems(self, target: Target, *, measured: bool = False) -> list[str]:
        """Why this kernel must not ship for the target; empty when it may.

        Args:
            measured: whether the schedule won by measurement; it may spill then.
        """
        found = []
        if not measured and self.spill_bytes > MAX_SPILL_BYTES:
            found.append(f"spills {self.spill_bytes} bytes a thread (limit {MAX_SPILL_BYTES})")
        if self.shared_bytes > target.shared_memory:
            limit = target.shared_memory
            found.append(f"needs {self.shared_bytes} bytes of shared memory (limit {limit})")
        return found


def read_resources(kernel: str, compiled: Any, target: Target) -> Resources:
    """Read a compiled kernel's resources from its binary.

    Raises:
        BuildError: the disassembler that ships with Triton cannot read the binary.
    """
    if target.backend == "hip":
        return _read_amd(kernel, compiled, target)
    return _read_nvidia(kernel, compiled, target)


def _read_nvidia(kernel: str, compiled: Any, target: Target) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    fields = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    matrix = next((name for opcode, name in _SASS_MATRIX if f" {opcode}" in sass), "none")
    return Resources(
        kernel=kernel,
        target=str(target),
        registers=int(fields.get("REG", 0)),
        spill_bytes=int(fields.get("STACK", 0)) + int(fields.get("LOCAL", 0)),
        shared_bytes=int(compiled.metadata.shared),
        matrix=matrix,
    )


def _read_amd(kernel: str, compiled: Any, target: Target) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return Resources(
        kernel=kernel,
        target=str(target),
        registers=number("vgpr_count"),
        spill_bytes=number("private_segment_fixed_size"),
        shared_bytes=int(compiled.metadata.shared),
        matrix="mfma" if "v_mfma" in text else "none",
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"cuobjdump {option}: must read the cubin; it said {done.stderr.strip()}")
    return done.stdout
