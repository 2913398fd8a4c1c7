"""Machine code: which instructions of a kernel lie in loops.

nvdisasm, which comes with Triton, prints it. That takes about a second, so it runs only for
tests and for kernels that use the stack (`stack_traffic_in_loops`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from nsagen.core.errors import BuildError

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\d+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address in bytes, name with suffixes, and operands as text."""

    address: int
    name: str
    operands: str
    predicate: str = ""


def instructions(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a cubin's kernel, and the address of each label.

    Raises:
        BuildError: nvdisasm is missing, or cannot read it.
    """
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run(
                [str(nvdisasm), "-c", file.name], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(
                f"resources: needs Triton's nvdisasm to read machine code; got {error}; "
                "reinstall triton"
            ) from None
    return parse(done.stdout)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Parse what nvdisasm printed."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif match := _LINE.match(line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            found.append(Instruction(address, match[3], match[4], match[2] or ""))
    return found, labels


def loops(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) address of each loop: a branch back, and what it jumps over.

    A kernel ends in a branch to itself, which does not count.
    """
    spans = []
    for instruction in code:
        target = _TARGET.search(instruction.operands)
        if instruction.name.startswith("BRA") and target and target[1] in labels:
            first = labels[target[1]]
            if first < instruction.address:
                spans.append((first, instruction.address))
    return spans


def stack_traffic_in_loops(cubin: bytes) -> int:
    """How many loads and stores of the stack lie in loops: the cost of a spill at each step."""
    code, labels = instructions(cubin)
    spans = loops(code, labels)
    return sum(
        i.name.split(".")[0] in ("LDL", "STL")
        and any(first <= i.address <= last for first, last in spans)
        for i in code
    )


_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_BRANCH = re.compile(r"^\s+s_c?branch\w*\s+(\.LBB\w+)")
_GCN_STACK = re.compile(r"^\s+(scratch_(load|store)|buffer_(load|store)\S*\s.*\soff, s\[0:3\])")


def gcn_stack_traffic_in_loops(assembly: str) -> int:
    """As `stack_traffic_in_loops`, for AMD's assembly, where a line stands for an address."""
    lines = assembly.splitlines()
    labels = {found[1]: n for n, line in enumerate(lines) if (found := _GCN_LABEL.match(line))}
    spans = [
        (labels[found[1]], n)
        for n, line in enumerate(lines)
        if (found := _GCN_BRANCH.match(line)) and labels.get(found[1], n) < n
    ]
    return sum(
        bool(_GCN_STACK.match(line)) and any(first <= n <= last for first, last in spans)
        for n, line in enumerate(lines)
    )
