"""Triton compiles a kernel anew for integers that are 1, or multiples of 16: each must compile.

An argument that is 1 is no tensor inside the kernel but Python's own int, which has no methods.
The interpreter does not show that, and ordinary sizes seldom meet it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nsagen.aot.compile import RecordedLaunch, compile_launch, recorded_launches
from nsagen.cases.base import Sizes
from nsagen.codegen.template import kernel_name, render, spaces_for, spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import STATIC_PARAMS, Schedule, Workload
from nsagen.reports.target_support import representative
from nsagen.spec import load_spec

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


def compiles(
    work: Workload, schedule: Schedule, value: int, folder: Path, sizes: Sizes | None = None
) -> None:
    path = folder / f"{kernel_name(work, schedule)}.py"
    path.write_text(render(work, schedule, "# test"))
    for call in recorded_launches(path, work, sizes):
        compile_launch(with_integers(call, value), TARGET, path.stem)


def test_every_algorithm_is_among_them() -> None:
    known = {
        f"{op} {pass_} {space.algorithm}"
        for op, pass_ in STATIC_PARAMS
        for space in spaces_of(op, pass_)
        if space.runs_on(TARGET)
    }
    assert VARIANTS.keys() == known


@pytest.mark.parametrize("name", VARIANTS)
def test_all_are_one(name: str, tmp_path: Path) -> None:
    compiles(*VARIANTS[name], 1, tmp_path)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "decode" in name])
def test_all_are_one_and_caches_are_paged(name: str, tmp_path: Path) -> None:
    if not name.startswith("linear"):
        compiles(*VARIANTS[name], 1, tmp_path, PAGED)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_all_are_multiples_of_16(name: str, tmp_path: Path) -> None:
    compiles(*VARIANTS[name], 48, tmp_path)
