"""Stack traffic that costs something at each step: loads and stores of the stack within loops."""

from __future__ import annotations

import re
from pathlib import Path

from nsagen.aot import machine_code
from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.aot.machine_code import gcn_stack_traffic_in_loops, loops, parse
from nsagen.codegen.template import render, space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload

SASS = """
        /*0000*/                   STL [R1], R4 ;
.L_x_1:
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/                   FFMA R3, R2, R2, R3 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   LDL.LU R2, [R1+0x4] ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""
GCN = """
	scratch_store_dword off, v1, s32
.LBB0_2:
	buffer_load_dword v3, off, s[0:3], 0 offset:4
	v_add_f32 v3, v3, v3
	buffer_load_dwordx4 v[4:7], v2, s[8:11], 0 offen
	s_cbranch_scc1 .LBB0_2
	scratch_load_dword v1, off, s32
"""


def test_only_what_lies_in_a_loop_counts(monkeypatch) -> None:
    code, labels = parse(SASS)
    assert loops(code, labels) == [(0x10, 0x30)]
    assert [i.name for i in code if i.predicate] == ["BRA"]
    monkeypatch.setattr(machine_code, "instructions", lambda cubin: (code, labels))
    assert machine_code.stack_traffic_in_loops(b"") == 1


def test_amd_assembly() -> None:
    """Buffer loads of the stack have its descriptor; others are of tensors."""
    assert gcn_stack_traffic_in_loops(GCN) == 1


def test_a_kernel_that_spills_in_its_loop(tmp_path: Path) -> None:
    """Steps far too large for one warp: what nvdisasm prints of them is understood."""
    work = Workload.of(
        "selected_attention",
        "forward",
        dtype="bfloat16",
        head_dim=128,
        v_head_dim=128,
        gqa_ratio=16,
        block_size=64,
    )
    space = space_for(work, "query_major")
    target = KNOWN_TARGETS["cuda:80"]
    default = dict(space.default(work, target))
    counts = []
    for knobs in (default, {**default, "num_warps": 1, "block_n": 64, "num_stages": 1}):
        path = tmp_path / "kernel.py"
        path.write_text(render(work, Schedule.of("query_major", knobs), header="# spills"))
        (call,) = recorded_launches(path, work)
        cubin = compile_launch(call, target, "spills").asm["cubin"]
        counts.append(machine_code.stack_traffic_in_loops(cubin))
        names = {i.name for i in machine_code.instructions(cubin)[0]}
        assert any(re.match(r"HMMA", name) for name in names)
    assert counts[0] == 0
    assert counts[1] > 0
