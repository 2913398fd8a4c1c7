"""Every shape that a spec may ask for has a default that fits each target.

Defaults are also compiled: the smallest corner of each pass, and one shape and target for each op
without corners, always the same. `make test-shapes` compiles all of them and draws new shapes for
as long as SHAPES_SECONDS says; a failure prints the pair.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.aot.resources import read_resources
from nsagen.codegen.template import default_schedule, render, space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import (
    COMPRESS_TYPES,
    DTYPES,
    STATIC_PARAMS,
    Param,
    Schedule,
    Workload,
    spec_names,
)

SECONDS = float(os.environ.get("SHAPES_SECONDS", "0"))
USUAL: dict[str, Param] = {
    **{"kernel_size": 32, "kernel_stride": 16, "topk": 16, "init_blocks": 1, "local_blocks": 2},
    **{"window_size": 512, "compress_type": "avgpool", "v_compress_type": "avgpool"},
    **{"with_pe": False},
}
HEADS = ((64, 64), (128, 128), (72, 248), (192, 128), (256, 256))
GROUPS, BLOCKS = (1, 4, 16, 48, 64), (16, 64, 128, 512, 999, 1024)
PRODUCTS: dict[str, Param] = {"score_norm": "none", "score_heads": "each", "score_pool": "max"}
SCORES: tuple[dict[str, Param], ...] = (
    {},
    PRODUCTS,
    {**PRODUCTS, "kernel_size": 1, "kernel_stride": 1},
    {"score_heads": "each", "score_pool": "max"},
)
"""How block selection's members score blocks: NSA's way, and others'."""


def workload(
    op: str, pass_: str, dtype: str, heads: tuple[int, int], group: int, block: int, **more: Param
) -> Workload:
    sizes = {"head_dim": heads[0], "v_head_dim": heads[1], "gqa_ratio": group, "block_size": block}
    params = {**USUAL, **sizes, "index_head_dim": heads[1], **more}
    names = [name for name in spec_names(op, pass_) if name in params]
    return Workload.of(op, pass_, dtype=dtype, **{name: params[name] for name in names})


@functools.cache
def every_workload() -> tuple[Workload, ...]:
    """Each op with every combination of the sizes above that it takes."""
    drawn = itertools.product(STATIC_PARAMS, DTYPES, HEADS, GROUPS, BLOCKS, (16, 1))
    return tuple(
        dict.fromkeys(
            workload(*op, *sizes, kernel_stride=stride)
            for op, *sizes, stride in drawn
            if sizes[-1] % stride == 0
        )
    )


def halves() -> Iterator[Any]:
    """Each target and every other workload; the others of it as a slow test."""
    for (n, target), half in itertools.product(enumerate(KNOWN_TARGETS), (0, 1)):
        yield pytest.param(target, half, marks=[pytest.mark.slow] if (n + half) % 2 else [])


@pytest.mark.parametrize(("target", "half"), halves())
def test_every_shape_has_a_default_that_fits(target: str, half: int) -> None:
    """All ops, dtypes, head sizes, groups and blocks of up to 1024 tokens and as many windows."""
    for work in every_workload()[half::2]:
        schedule = default_schedule(work, KNOWN_TARGETS[target])
        space = space_for(work, schedule.algorithm)
        assert not space.violations(work, schedule, KNOWN_TARGETS[target])


@st.composite
def pairs(draw: st.DrawFn, op: str, pass_: str) -> tuple[Workload, str]:
    """A workload and a target."""
    dim = st.integers(2, 32).map(lambda n: n * 8)
    heads = draw(st.one_of(st.sampled_from(HEADS), st.tuples(dim, dim)))
    group = draw(st.one_of(st.sampled_from(GROUPS), st.integers(1, 64)))
    block = draw(st.one_of(st.sampled_from(BLOCKS), st.integers(16, 1024)))
    stride = draw(st.sampled_from([n for n in (1, 4, 8, 16, 32) if block % n == 0]))
    sizes = {"kernel_size": stride * draw(st.sampled_from((1, 2, 4))), "kernel_stride": stride}
    kind = draw(st.sampled_from(COMPRESS_TYPES))
    sizes |= {"compress_type": kind, "v_compress_type": kind, "mlp_hidden": draw(dim)}
    sizes |= {"topk": draw(st.sampled_from((4, 16, 64, 256)))}
    if op == "block_selection":
        sizes |= draw(st.sampled_from(SCORES))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    work = workload(op, pass_, dtype, heads, group, block, **sizes)
    return work, draw(st.sampled_from(sorted(KNOWN_TARGETS)))


def check(
    work: Workload, target: str, folder: Path, kernels: int | None = None, **knobs: Param
) -> int:
    """Compile a default; see that it fits, by its formula too. Accesses of the stack in loops.

    Args:
        kernels: how many of those that a call launches, from the first on; None: all.
        knobs: other values than the default's.
    """
    schedule = default_schedule(work, KNOWN_TARGETS[target])
    schedule = Schedule.of(schedule.algorithm, {**dict(schedule.knobs), **knobs})
    path = folder / "kernel.py"
    path.write_text(render(work, schedule, header="# drawn"))
    space, spilled = space_for(work, schedule.algorithm), 0
    estimate = space.memory_on(work, schedule, KNOWN_TARGETS[target])
    for call in recorded_launches(path, work)[:kernels]:
        compiled = compile_launch(call, KNOWN_TARGETS[target], "drawn")
        found = read_resources(call.kernel.__name__, compiled, KNOWN_TARGETS[target])
        where = f"{work} on {target}, {schedule}: {found}"
        assert not found.problems(KNOWN_TARGETS[target], measured=True), where
        if call.kernel.__name__.startswith(work.op):
            assert found.shared_bytes <= estimate, f"{where}; the estimate is {estimate}"
        spilled += found.loop_spills
    return spilled


MANY_BLOCKS: dict[str, Param] = {"kernel_size": 1, "kernel_stride": 1, "topk": 64}
LINEAR: dict[str, Param] = {"compress_type": "linear", "v_compress_type": "linear"}
SHORT_WINDOWS: dict[str, Param] = {**LINEAR, "kernel_size": 2, "kernel_stride": 1}
APART: dict[str, Param] = {"score_heads": "each", "score_pool": "max", "kernel_stride": 4}
MANY_APART: dict[str, Param] = {**MANY_BLOCKS, "score_heads": "each", "score_pool": "max"}
MSA: dict[str, Param] = {**PRODUCTS, "kernel_size": 1, "kernel_stride": 1}
CORNERS = (
    (("selected_attention", "forward", "float32", (72, 248), 1, 48), "cuda:120"),
    (("selected_attention", "forward", "float32", (128, 128), 20, 512), "cuda:90"),
    (("selected_attention", "forward", "bfloat16", (128, 168), 1, 999), "cuda:89"),
    (("selected_attention", "forward", "float16", (16, 16), 2, 512), "cuda:90"),
    (("selected_attention", "backward", "float16", (16, 16), 2, 512), "cuda:90"),
    (("selected_attention", "backward", "float32", (256, 256), 64, 1024), "cuda:86"),
    (("selected_attention", "backward", "bfloat16", (104, 240), 64, 64), "cuda:90"),
    (("sliding_window_attention", "backward", "float32", (120, 160), 60, 64), "cuda:80"),
    (("sliding_window_attention", "backward", "float32", (72, 248), 1, 64), "hip:gfx942"),
    (("selected_attention", "backward", "float32", (256, 256), 16, 64), "hip:gfx942"),
    (("selected_attention", "backward", "float32", (64, 64), 64, 128), "hip:gfx942"),
    (("compressed_attention", "backward", "float16", (24, 136), 48, 64), "cuda:100"),
    (("native_sparse_attention", "decode", "bfloat16", (88, 216), 46, 1024), "cuda:120"),
    (("block_selection", "forward", "float32", (128, 128), 1, 64), "cuda:86"),
    (("block_selection", "forward", "float16", (64, 64), 36, 128), "cuda:86"),
    (("block_selection", "forward", "float16", (240, 240), 50, 512), "cuda:80"),
    (("block_selection", "forward", "float32", (256, 256), 64, 512), "cuda:86"),
    (("block_selection", "forward", "float32", (256, 256), 48, 64), "cuda:86"),
    (("block_selection", "forward", "float32", (256, 256), 49, 64), "cuda:89"),
    (("block_selection", "forward", "float32", (128, 128), 48, 64), "cuda:90"),
    (("block_selection", "forward", "float32", (64, 64), 20, 64), "cuda:120"),
    (("block_selection", "forward", "float32", (256, 256), 16, 64), "cuda:86"),
    (("block_selection", "forward", "float32", (128, 128), 4, 128, MSA), "cuda:90"),
    (("compressed_lse", "forward", "float32", (72, 72), 48, 64), "cuda:86"),
    (("block_selection", "forward", "bfloat16", (72, 72), 13, 329, MANY_BLOCKS), "cuda:120"),
    (("cache_append", "decode", "float32", (72, 248), 1, 64, LINEAR), "cuda:86"),
    (("cache_append", "decode", "bfloat16", (128, 128), 16, 64, SHORT_WINDOWS), "cuda:80"),
    (("index_loss", "backward", "bfloat16", (120, 200), 4, 16), "cuda:89"),
    (("index_loss", "backward", "float32", (152, 208), 64, 22), "cuda:90"),
    (("index_loss", "backward", "float32", (56, 192), 4, 512), "cuda:90"),
    (("selected_attention", "backward", "bfloat16", (176, 96), 18, 999), "cuda:120"),
    (("selected_attention", "backward", "float32", (208, 200), 25, 538), "cuda:100"),
    (("selected_attention", "backward", "float32", (176, 144), 4, 64), "cuda:100"),
    (("selected_attention", "forward", "bfloat16", (64, 64), 1, 16), "cuda:100"),
    (("sliding_window_attention", "backward", "bfloat16", (208, 88), 51, 64), "cuda:100"),
    (("block_selection", "decode", "bfloat16", (240, 240), 64, 560, APART), "cuda:100"),
    (("block_selection", "decode", "float32", (72, 72), 48, 64, MSA), "cuda:86"),
    (("sliding_window_attention", "forward", "bfloat16", (16, 16), 1, 64), "cuda:100"),
    (("compressed_attention", "forward", "bfloat16", (16, 16), 1, 64, MANY_BLOCKS), "cuda:100"),
    (("compressed_attention", "decode", "bfloat16", (64, 104), 4, 64), "cuda:120"),
    (("compressed_attention", "decode", "bfloat16", (72, 72), 13, 329, MANY_BLOCKS), "cuda:90"),
    (("index_loss", "forward", "float32", (128, 128), 57, 512), "cuda:89"),
    (("index_loss", "backward", "bfloat16", (248, 48), 9, 16), "cuda:86"),
    (("dense_index_loss", "forward", "float32", (64, 64), 40, 64), "cuda:86"),
    (("dense_index_loss", "backward", "float32", (256, 256), 4, 64), "hip:gfx942"),
    (("dense_index_loss", "backward", "bfloat16", (72, 200), 5, 64), "cuda:90"),
    (("selected_attention", "backward", "float16", (192, 48), 47, 64), "cuda:90"),
    (("selected_attention", "backward", "float16", (40, 56), 1, 512), "cuda:90"),
    (("selected_attention", "backward", "float16", (64, 248), 4, 343), "cuda:80"),
    (("selected_attention", "backward", "float16", (24, 24), 57, 1023), "cuda:100"),
    (("selected_attention", "backward", "bfloat16", (256, 16), 3, 128), "cuda:90"),
    (("selected_attention", "backward", "float32", (88, 88), 1, 64), "cuda:90"),
    (("block_selection", "forward", "bfloat16", (64, 64), 55, 64), "cuda:90"),
    (("block_selection", "forward", "float16", (192, 192), 3, 97, MANY_BLOCKS), "cuda:90"),
    (("block_selection", "forward", "bfloat16", (136, 136), 20, 64, MANY_BLOCKS), "cuda:90"),
    (("block_selection", "forward", "bfloat16", (176, 176), 16, 139, MANY_APART), "cuda:86"),
)
"""Shapes whose defaults did not fit, or used the stack in a loop."""


def size(corner: tuple[tuple, str]) -> int:
    _, _, dtype, heads, group, *_ = corner[0]
    return sum(heads) * max(16, group) * (2 if dtype == "float32" else 1)


def corners() -> Iterator[Any]:
    """The smallest corner of each op and pass; the others as slow tests."""
    passes: set[tuple[str, str]] = set()
    for case, target in sorted(CORNERS, key=size):
        marks = [pytest.mark.slow] if case[:2] in passes else []
        passes.add(case[:2])
        yield pytest.param(case, target, marks=marks, id=f"{case}-{target}")


@pytest.mark.parametrize(("case", "target"), list(corners()))
def test_corners_that_did_not_fit(case: tuple, target: str, tmp_path: Path) -> None:
    more = case[6] if len(case) > 6 else {}
    assert check(workload(*case[:6], **more), target, tmp_path) == 0


def test_queries_loaded_steps_ahead_are_counted(tmp_path: Path) -> None:
    """Those of wide float32 groups, which each step of block selection loads anew."""
    work = workload("block_selection", "forward", "float32", (256, 256), 40, 64)
    assert check(work, "cuda:80", tmp_path, num_stages=3) == 0


def ops() -> Iterator[Any]:
    """Those of which no corner is compiled; the others as slow tests."""
    with_corners = {case[0] for case, _ in CORNERS}
    for op in sorted({op for op, _ in STATIC_PARAMS}):
        yield pytest.param(op, marks=[pytest.mark.slow] if op in with_corners else [])


@pytest.mark.parametrize("op", list(ops()))
def test_one_shape_and_target(op: str, tmp_path: Path) -> None:
    """The first kernel of one pass of each op; always the same, and small: a second each."""
    rng = random.Random(op)
    pass_ = rng.choice([pass_ for known, pass_ in sorted(STATIC_PARAMS) if known == op])
    heads, group = rng.choice(((16, 16), (32, 32), (24, 40))), rng.choice((1, 2))
    dtype, target = rng.choice(("float16", "bfloat16")), rng.choice(sorted(KNOWN_TARGETS))
    work = workload(op, pass_, dtype, heads, group, rng.choice((16, 64)))
    assert check(work, target, tmp_path, kernels=1) == 0


@pytest.mark.skipif(not SECONDS, reason="compiles for minutes; make test-shapes runs it")
@pytest.mark.parametrize(("op", "pass_"), sorted(STATIC_PARAMS))
def test_many_shapes_and_targets(op: str, pass_: str, tmp_path: Path) -> None:
    """None that fits uses the stack in a loop."""
    end = time.monotonic() + SECONDS / len(STATIC_PARAMS)

    @hypothesis.settings(
        max_examples=10, deadline=None, derandomize=False, database=None,
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(pairs(op, pass_))
    def draw(pair: tuple[Workload, str]) -> None:
        if time.monotonic() < end:
            spilled = check(*pair, tmp_path)
            assert not spilled, f"{pair[0]} on {pair[1]}: uses the stack {spilled} times in loops"

    while time.monotonic() < end:
        draw()
