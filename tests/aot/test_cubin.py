"""Registers and stack as the file says them are those that NVIDIA's own tool prints."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.aot.cubin import cubin_usage
from nsagen.codegen.template import default_schedule, kernel_name, render
from nsagen.core.errors import BuildError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Workload

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.parametrize("name", ["cuda:80", "cuda:90", "cuda:100"])
def test_usage_is_what_the_disassembler_prints(tmp_path: Path, name: str) -> None:
    target = KNOWN_TARGETS[name]
    workload = Workload.of("gated_sum", "forward", dtype="float16", v_head_dim=64)
    schedule = default_schedule(workload, target)
    path = tmp_path / f"{kernel_name(workload, schedule)}.py"
    path.write_text(render(workload, schedule, header="# a test"))
    (call,) = recorded_launches(path, workload)
    cubin = compile_launch(call, target, path.stem).asm["cubin"]
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    said = subprocess.run(
        [TOOL, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    assert cubin_usage(cubin) == (int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"]))


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02", b"not a cubin" * 100, b"\x7fELF\x02" * 50])
def test_what_is_no_cubin_is_refused(data: bytes) -> None:
    with pytest.raises(BuildError, match="must be a cubin"):
        cubin_usage(data)
