"""A fault of the assembler before CUDA 13.0: an arrival's address is lost before it is read.

An arrival at a barrier in shared memory reads its address from a register some time after it was
issued; a scoreboard tells when, and what sets that register again must wait for it. The ptxas of
CUDA 12.8 and 12.9, which come with Triton 3.6 and 3.9, can let a load from memory set it without
that wait. Then the arrival may be at whatever was loaded: an illegal access. The ptxas of CUDA 13.0
makes the same instructions of the same PTX, with the wait.

In `arrival.ptx` that is all that is left of a former pipeline of selected attention's gradients.
On an H200 its groups of 64 ended in an illegal access with [232, 40] registers a thread, whose
code has the fault in both consumers. They worked with [240, 24], whose code has not, and with
[232, 40] by the ptxas of CUDA 13.0; see benchmarks/NOTES.md. test_pipeline_barriers.py
looks for it in today's pipelines.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PTX = Path(__file__).with_name("arrival.ptx")
CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x")
CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Issue:
    """An instruction: the scoreboard that it releases once it has read its operands, if any, and a
    bit for each scoreboard that it waits for."""

    name: str
    operands: str
    reads: int | None
    waits: int


def blocks(text: str) -> list[list[Issue]]:
    """What `nvdisasm -c -hex` printed, cut where branches start or end."""
    found: list[list[Issue]] = [[]]
    code: re.Match[str] | None = None
    for line in text.splitlines():
        if line.strip().endswith(":"):
            found.append([])
        elif match := CODE.search(line):
            code = match
        elif code and (match := CONTROL.match(line)):
            control = int(match[1], 16) >> 41  # stall, yield, scoreboards set by results and reads
            reads = control >> 8 & 7
            found[-1].append(
                Issue(code[1], code[2], None if reads == 7 else reads, control >> 11 & 63)
            )
            code = None
    return found


def lost_addresses(text: str) -> list[str]:
    """Loads that set an arrival's address without a wait until the arrival has read it."""
    found = []
    for block in blocks(text):
        pending: dict[str, Issue] = {}  # the arrival that may still read a register
        for issue in block:
            pending = {r: a for r, a in pending.items() if not issue.waits >> (a.reads or 0) & 1}
            if issue.name.startswith("LDG"):
                result = issue.operands.partition(",")[0]
                if result in pending:
                    found.append(f"{pending[result].operands} before {issue.operands}")
            if issue.name.startswith("SYNCS.ARRIVE") and issue.reads is not None:
                pending |= dict.fromkeys(re.findall(r"\bR\d+\b", issue.operands), issue)
    return found


def machine_code(cubin: Path) -> str:
    command = [str(TOOLS / "nvdisasm"), "-c", "-hex", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def line(name: str, operands: str, *, reads: int = 7, waits: int = 0) -> str:
    control = (waits << 11 | reads << 8) << 41
    return f"        /*0a30*/   {name} {operands} ; /* 0x{0:016x} */\n  /* 0x{control:016x} */\n"


@pytest.mark.parametrize(
    ("between", "load", "found"),
    [
        ("", line("LDG.E", "R2, desc[UR8][R10.64]"), 1),
        ("", line("LDG.E", "R3, desc[UR8][R10.64]"), 0),
        ("", line("LDG.E", "R2, desc[UR8][R10.64]", waits=2), 0),
        (line("DEPBAR.LE", "SB0, 0x0"), line("LDG.E", "R2, desc[UR8][R10.64]", waits=1), 1),
        (line("NOP", "", waits=2), line("LDG.E", "R2, desc[UR8][R10.64]"), 0),
        (".L_x_1:\n", line("LDG.E", "R2, desc[UR8][R10.64]"), 0),
    ],
)
def test_a_lost_address_is_seen(between: str, load: str, found: int) -> None:
    arrival = line("SYNCS.ARRIVE.TRANS64.A1T0", "RZ, [R2+URZ+0x345e0], RZ", reads=1)
    assert len(lost_addresses(arrival + between + load)) == found


def test_the_fault(tmp_path: Path) -> None:
    """In Triton's ptxas before CUDA 13.0, and not in 13.0's."""
    said = subprocess.run([str(TOOLS / "ptxas"), "--version"], capture_output=True, text=True)
    version = re.search(r"release (\d+)\.", said.stdout)
    assert version
    cubin = tmp_path / "arrival.cubin"
    subprocess.run([str(TOOLS / "ptxas"), "-arch=sm_90a", str(PTX), "-o", str(cubin)], check=True)
    assert bool(lost_addresses(machine_code(cubin))) == (int(version[1]) < 13)
