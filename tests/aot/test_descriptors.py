"""A fault of the assembler in Triton 3.6: a product's operand is described by a stale register.

On Hopper the descriptor of an operand in shared memory is made of the tile's address, constants and
the warp's number. For dq by columns with one stage, the ptxas of Triton 3.6.0 loses the address on
its way to a uniform register, and takes what an earlier pointer has left there. An H200 then ends
in an illegal memory access ("Invalid __shared__ read" in memcheck), with 4 and 8 warps, every time.
The ptxas of CUDA 13.0 makes right code of the same PTX, and so does that of Triton 3.9. A rule of
the space forbids the schedule: remove it, and this, with the support of Triton 3.6.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.aot.machine_code import Instruction, instructions
from nsagen.codegen.template import render, space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload

TARGET = KNOWN_TARGETS["cuda:90"]
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
NO_RESULT = ("ST", "RED", "BRA", "BRX", "BAR", "SYNCS", "ISETP", "FSETP", "UISETP", "WARPSYNC")


def foreign_descriptors(code: list[Instruction]) -> list[int]:
    """Addresses of wgmmas whose second operand's descriptor depends on the kernel's parameters.

    Follows instructions in the order of their addresses, which for a kernel with one loop is that
    of its first step: where a register's value comes from is known at each.
    """
    from_parameters: set[str] = set()
    found = []
    for i in code:
        operands = [part.strip() for part in re.split(r",(?![^\[]*\])", i.operands)]
        if i.name.startswith("HGMMA"):
            if first := re.search(r"gdesc\[UR(\d+)\]", i.operands):
                second = {f"UR{int(first[1]) + n}" for n in (2, 3)}
                found += [i.address] if second & from_parameters else []
            continue
        result = re.fullmatch(r"(U?R)(\d+)", operands[0])
        if not result or i.name.startswith(NO_RESULT):
            continue
        sources = ",".join(operands[1:])
        foreign = "c[0x0]" in sources or "SR_CTAID" in sources or i.name.startswith("LDG")
        foreign |= any(name in from_parameters for name in re.findall(r"\bU?R\d+", sources))
        foreign &= not i.name.startswith("SHFL")  # the warp's number
        width = 2 if ".64" in i.name or ".WIDE" in i.name else 1
        names = {f"{result[1]}{int(result[2]) + n}" for n in range(width)}
        from_parameters = from_parameters | names if foreign else from_parameters - names
    return found


def faults(tmp_path: Path, **knobs: int | str) -> list[int]:
    work = Workload.of(
        "selected_attention",
        "backward",
        dtype="bfloat16",
        head_dim=128,
        v_head_dim=128,
        gqa_ratio=4,
        block_size=64,
    )
    space = space_for(work, "two_pass")
    schedule = Schedule.of("two_pass", {**space.default(work, TARGET), **knobs})
    path = tmp_path / "kernel.py"
    path.write_text(render(work, schedule, header="# columns"))
    (call,) = (c for c in recorded_launches(path, work) if c.kernel.__name__.endswith("_queries"))
    code, _ = instructions(compile_launch(call, TARGET, "columns").asm["cubin"])
    assert any(i.name.startswith("HGMMA") for i in code)
    return foreign_descriptors(code)


def test_the_fault(tmp_path: Path) -> None:
    """In Triton 3.6, and no longer in 3.9."""
    if (3, 6) < VERSION < (3, 9):
        pytest.skip("the assemblers of these releases were not looked at")
    found = faults(tmp_path, orientation="columns", block_n=64, num_warps=4, num_stages=1)
    assert bool(found) == (VERSION == (3, 6))


def test_what_the_space_allows_has_no_such_fault(tmp_path: Path) -> None:
    assert not faults(tmp_path, orientation="columns", block_n=64, num_warps=4, num_stages=3)


def test_the_space_forbids_it() -> None:
    work = Workload.of(
        "selected_attention",
        "backward",
        dtype="bfloat16",
        head_dim=128,
        v_head_dim=128,
        gqa_ratio=4,
        block_size=64,
    )
    space = space_for(work, "two_pass")
    knobs = {**space.default(work, TARGET), "orientation": "columns", "block_n": 64}
    for stages, wrong in ((1, True), (2, False)):
        schedule = Schedule.of("two_pass", {**knobs, "num_warps": 4, "num_stages": stages})
        assert bool(space.violations(work, schedule, TARGET)) == wrong
    assert not space.violations(
        work, Schedule.of("two_pass", {**knobs, "num_stages": 1}), KNOWN_TARGETS["cuda:80"]
    )
