"""Every shape that a spec may ask for has a default that fits each target, or is refused by name.

Selected attention's defaults are also compiled: two shapes and targets by default, always the same;
`make test-shapes` draws new ones for as long as SHAPES_SECONDS says. A failure prints the pair.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.aot.resources import read_resources
from nsagen.codegen.template import default_schedule, render, space_for
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import DTYPES, STATIC_PARAMS, Param, Workload, parameter_names

SECONDS = float(os.environ.get("SHAPES_SECONDS", "0"))
USUAL: dict[str, Param] = {
    **{"kernel_size": 32, "kernel_stride": 16, "topk": 16, "init_blocks": 1, "local_blocks": 2},
    **{"window_size": 512, "compress_type": "avgpool", "v_compress_type": "avgpool"},
    **{"with_pe": False},
}
HEADS = ((64, 64), (128, 128), (72, 248), (192, 128), (256, 256))
GROUPS, BLOCKS = (1, 4, 16, 48, 64), (16, 64, 128, 512, 1024)
SELECTED = (("selected_attention", "forward"), ("selected_attention", "backward"))


def workload(
    op: str, pass_: str, dtype: str, heads: tuple[int, int], group: int, block: int, **more: Param
) -> Workload:
    sizes = {"head_dim": heads[0], "v_head_dim": heads[1], "gqa_ratio": group, "block_size": block}
    params = {**USUAL, **sizes, **more}
    names = [name for name in parameter_names(op, pass_) if name in params]
    return Workload.of(op, pass_, dtype=dtype, **{name: params[name] for name in names})


@functools.cache
def every_workload() -> tuple[Workload, ...]:
    """Each op with every combination of the sizes above that it takes."""
    drawn = itertools.product(STATIC_PARAMS, DTYPES, HEADS, GROUPS, BLOCKS, (16, 1))
    return tuple(
        dict.fromkeys(workload(*op, *sizes, kernel_stride=stride) for op, *sizes, stride in drawn)
    )


@pytest.mark.parametrize("target", KNOWN_TARGETS)
def test_every_shape_has_a_default_that_fits(target: str) -> None:
    """All ops, dtypes, head sizes, groups and blocks of up to 1024 tokens and as many windows."""
    refused = {}
    for work in every_workload():
        try:
            schedule = default_schedule(work, KNOWN_TARGETS[target])
        except UnsupportedWorkloadError as error:
            refused[work] = str(error)
            continue
        space = space_for(work, schedule.algorithm)
        assert not space.violations(work, schedule, KNOWN_TARGETS[target])
    for work, said in refused.items():
        assert f"bytes of shared memory, {target} has" in said
        assert (work.op, work.pass_, work.dtype) == ("selected_attention", "backward", "float32")
        assert target == "hip:gfx942"


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Workload, str]:
    """A workload of selected attention and a target."""
    dim = st.integers(2, 32).map(lambda n: n * 8)
    op, pass_ = draw(st.sampled_from(SELECTED))
    heads = draw(st.one_of(st.sampled_from(HEADS), st.tuples(dim, dim)))
    group = draw(st.one_of(st.sampled_from(GROUPS), st.integers(1, 64)))
    block = draw(st.one_of(st.sampled_from(BLOCKS), st.integers(16, 1024)))
    work = workload(op, pass_, draw(st.sampled_from(sorted(DTYPES))), heads, group, block)
    return work, draw(st.sampled_from(sorted(KNOWN_TARGETS)))


def check(work: Workload, target: str, folder: Path) -> None:
    """Compile a default, and see that it fits, by its formula too, and that no loop spills."""
    try:
        schedule = default_schedule(work, KNOWN_TARGETS[target])
    except UnsupportedWorkloadError:
        return
    path = folder / "kernel.py"
    path.write_text(render(work, schedule, header="# drawn"))
    estimate = space_for(work, schedule.algorithm).shared_memory(work, schedule)
    for call in recorded_launches(path, work):
        compiled = compile_launch(call, KNOWN_TARGETS[target], "drawn")
        found = read_resources(call.kernel.__name__, compiled, KNOWN_TARGETS[target])
        where = f"{work} on {target}, {schedule}: {found}"
        assert not found.problems(KNOWN_TARGETS[target]), where
        if call.kernel.__name__.startswith(work.op):
            assert found.shared_bytes <= estimate, f"{where}; the estimate is {estimate}"


@pytest.mark.parametrize(
    ("case", "target"),
    [
        (("forward", "float32", (72, 248), 1, 48), "cuda:120"),
        (("backward", "float32", (256, 256), 64, 1024), "cuda:86"),
    ],
    ids=str,
)
def test_corners_that_did_not_fit(case: tuple, target: str, tmp_path: Path) -> None:
    check(workload("selected_attention", *case), target, tmp_path)


@pytest.mark.skipif(not SECONDS, reason="compiles for minutes; make test-shapes runs it")
def test_many_shapes_and_targets(tmp_path: Path) -> None:
    end = time.monotonic() + SECONDS

    @hypothesis.settings(
        max_examples=10, deadline=None, derandomize=False, database=None,
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(pairs())
    def draw(pair: tuple[Workload, str]) -> None:
        if time.monotonic() < end:
            check(*pair, tmp_path)

    while time.monotonic() < end:
        draw()
