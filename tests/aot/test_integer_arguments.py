"""Triton compiles a kernel anew for integers that are 1, or multiples of 16: each must compile.

An argument that is 1 is no tensor inside the kernel but Python's own int, which has no methods.
The interpreter does not show that, and ordinary sizes seldom meet it. Triton's front end does;
`make test-shapes` compiles to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nsagen.aot.compile import RecordedLaunch, compile_launch, recorded_launches
from nsagen.cases.base import Sizes
from nsagen.codegen.template import kernel_name, render, spaces_for, spaces_of
from nsagen.core.target import KNOWN_TARGETS, Target
from nsagen.core.workload import STATIC_PARAMS, Schedule, Workload
from nsagen.reports.target_support import representative
from nsagen.spec import load_spec
from tests.aot.conftest import check_accepted

TARGET = KNOWN_TARGETS["cuda:90"]
PAGED = Sizes((4095, 1000), kv_heads=4, capacity=8192, page_size=1024)

GATES = Workload.of(
    "compress",
    "backward",
    dtype="bfloat16",
    compress_type="sigmoid_mul",
    head_dim=128,
    kernel_size=32,
    kernel_stride=16,
    with_pe=True,
)
"""A type that llama8b has not, with an algorithm of its own."""

FORCED = Workload.of(
    "sliding_window_attention",
    "forward",
    dtype="bfloat16",
    **{"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16, "window_size": 512},
    **{"block_size": 64, "init_blocks": 1, "local_blocks": 2},
)
"""What a call asks for, not a spec."""


FAMILY = [w for n in ("minimax_m3", "minicpm4") for w in load_spec(n).workloads()]
"""What other members of the family than NSA have more."""


def variants() -> dict[str, tuple[Workload, Schedule]]:
    """The default schedule of each algorithm; of those that pool, the one with most inputs."""
    return {
        f"{work.op} {work.pass_} {space.algorithm}": (work, space.default_schedule(work, TARGET))
        for work in [*FAMILY, *representative(load_spec("llama8b")), GATES, FORCED]
        for space in spaces_for(work, TARGET)
    }


VARIANTS = variants()


def with_integers(call: RecordedLaunch, value: int) -> RecordedLaunch:
    """The same call, with `value` for each integer that is not a constexpr."""
    constants = {param.name for param in call.kernel.params if param.is_constexpr}
    integers = {
        name: value for name, arg in call.args.items() if type(arg) is int and name not in constants
    }
    return replace(call, args=call.args | integers)


def check(
    compiled: Callable[[RecordedLaunch, Target, str], object], name: str, value: int, folder: Path
) -> None:
    """Have what a variant launches compiled; a decoding op's on paged caches too."""
    work, schedule = VARIANTS[name]
    path = folder / f"{kernel_name(work, schedule)}.py"
    path.write_text(render(work, schedule, "# test"))
    paged = work.pass_ == "decode" and work.op != "linear"
    for sizes in (None, PAGED) if paged else (None,):
        for call in recorded_launches(path, work, sizes):
            compiled(with_integers(call, value), TARGET, path.stem)


def test_every_algorithm_is_among_them() -> None:
    known = {
        f"{op} {pass_} {space.algorithm}"
        for op, pass_ in STATIC_PARAMS
        for space in spaces_of(op, pass_)
        if space.runs_on(TARGET)
    }
    assert VARIANTS.keys() == known


@pytest.mark.usefixtures("front_end_alone")
@pytest.mark.parametrize("name", VARIANTS)
def test_all_are_one(name: str, tmp_path: Path) -> None:
    check(check_accepted, name, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("value", [1, 48])
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_to_the_end(name: str, value: int, tmp_path: Path) -> None:
    """Integers that are 1, or multiples of 16."""
    check(compile_launch, name, value, tmp_path)
