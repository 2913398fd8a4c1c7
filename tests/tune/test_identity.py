"""Schedules that are one: the same kernels, called in the same way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nsagen.cases.sizes import Sizes
from nsagen.codegen.template import kernel_name
from nsagen.core.workload import Schedule, Workload
from nsagen.tune.compiler import Compiled, Compiler
from nsagen.tune.identity import code_of

POOL = Workload.of(
    "compress",
    "backward",
    dtype="bfloat16",
    compress_type="avgpool",
    head_dim=64,
    kernel_size=32,
    kernel_stride=16,
    with_pe=False,
)
KNOBS = {"block_j": 1, "block_tokens": 16, "block_windows": 8, "num_warps": 4, "part_windows": 128}


@pytest.fixture
def compile_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(os, "nice", lambda by: 0)  # that would hold for all tests of this process

    def compiled(**knobs: int) -> Compiled:
        schedule = Schedule.of("pool", {**KNOBS, **knobs})
        path = tmp_path / f"{kernel_name(POOL, schedule)}.py"
        return Compiler().compile(path, POOL, schedule, "cuda:90", (Sizes((4096,)),))

    return compiled


def test_a_knob_that_changes_nothing_makes_no_other_schedule(compile_) -> None:
    """Without a position embedding there are no parts of windows to add up."""
    first = compile_()
    assert compile_(part_windows=256).identity == first.identity
    assert len({first.identity, compile_(block_tokens=32).identity}) == 2
    assert len({first.identity, compile_(num_warps=8).identity}) == 2


def test_a_file_is_not_written_again_while_it_may_be_read(compile_, tmp_path: Path) -> None:
    """A search compiles its winner again; another one's measurement may read the same file."""
    compile_()
    (path,) = tmp_path.glob("*.py")
    before = path.stat()
    compile_()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_names_comments_and_debugging_are_no_code() -> None:
    code = "\tadd.s32 %r1, %r2, 1;\n"
    noted = (
        '// made by a compiler\n\t.file 1 "/tmp/k_1.py"\n.entry k_1(\n\t.loc 1 2 3 // k_1.py:2\n'
        f"$L__tmp7:\n{code}\t.section\t.debug_str\n\t.b8 107\n"
    )
    assert code_of(noted, "k_1") == f".entry kernel(\n{code}"
    assert code_of(noted, "k_1") != code_of(noted.replace("%r2, 1", "%r2, 2"), "k_1")
