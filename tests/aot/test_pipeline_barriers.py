"""What a pipeline's warps did in shared memory comes before what they tell other warps.

One thread of a group arrives at the barrier where the other one waits, or has a tile copied to
memory. Its own accesses come before that; those of the group's other threads do only if all have
met since. Gluon's compiler puts that meeting there; the pipelines rely on it, and on a GPU its lack
would show by chance alone. tests/kernels/test_pipelines_on_cpu.py runs the barriers themselves.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.codegen.template import kernel_name, render, space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import STATIC_PARAMS, Param, Workload

from .test_arrivals import lost_addresses, machine_code

TARGET = KNOWN_TARGETS["cuda:90"]
PARAMS: dict[str, Param] = {  # of test_warp_specialized.py's kernels, which it compiles as well
    **{
        "head_dim": 128,
        "v_head_dim": 128,
        "index_head_dim": 128,
        "gqa_ratio": 16,
        "kernel_size": 32,
        "kernel_stride": 16,
    },
    **{"block_size": 64, "topk": 16, "init_blocks": 1, "local_blocks": 2, "window_size": 512},
}
ARRIVAL = re.compile(r"mbarrier\.arrive\.shared")  # not a copy's, which begins after it
STORE = re.compile(
    r"cp\.async\.bulk\.tensor\S*\.global\.shared"
)  # one thread's, of all threads' tile
ACCESS = re.compile(r"\b(?:st|ld)(?:\.shared|matrix)")
MEETING = re.compile(r"bar\.sync")


def early_arrivals(ptx: str) -> list[str]:
    """Arrivals, and bulk stores, with an access of shared memory since the threads met last."""
    found, after = [], ""
    for line in ptx.splitlines():
        if MEETING.search(line):
            after = ""
        elif ACCESS.search(line):
            after = line
        elif after and (ARRIVAL.search(line) or STORE.search(line)):
            found.append(f"{after.strip()} before {line.strip()}")
    return found


def test_an_early_arrival_is_seen() -> None:
    access, met = "st.shared.b32 [%r1], %r2;", "bar.sync 2, 128;"
    arrival = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];"
    assert early_arrivals(f"{access}\n{met}\n{arrival}") == []
    assert early_arrivals(f"{met}\n{access}\n{arrival}") == [f"{access} before {arrival}"]
    store = "@%p1 cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd1, {%r1}], [%r2];"
    assert early_arrivals(f"{access}\n{met}\n{store}") == []
    assert early_arrivals(f"{met}\n{access}\n{store}") == [f"{access} before {store}"]


@pytest.mark.parametrize(
    ("op", "pass_"),
    [
        ("selected_attention", "backward"),
        ("sliding_window_attention", "forward"),
        ("compressed_attention", "backward"),
        ("block_selection", "forward"),
    ],
)
def test_threads_meet_before_one_arrives(op: str, pass_: str, tmp_path: Path) -> None:
    """And what the assembler made of it reads each arrival's address; see test_arrivals.py."""
    params = {name: PARAMS[name] for name in STATIC_PARAMS[op, pass_]}
    work = Workload.of(op, pass_, dtype="bfloat16", **params)
    schedule = space_for(work, "warp_specialized").default_schedule(work, TARGET)
    path = tmp_path / f"{kernel_name(work, schedule)}.py"
    path.write_text(render(work, schedule, "# test"))
    arrivals = 0
    for call in recorded_launches(path, work):
        compiled = compile_launch(call, TARGET, path.stem)
        ptx = compiled.asm["ptx"]
        assert early_arrivals(ptx) == [], call.kernel.__name__
        arrivals += (found := len(ARRIVAL.findall(ptx)))
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        assert not found or lost_addresses(machine_code(cubin)) == [], call.kernel.__name__
    assert arrivals > 0
