"""Kernels on caches of a narrow dtype, compiled: they fit, and multiply by matrix instructions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nsagen.aot.cached import compiled_resources
from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.aot.machine_code import instructions, loops
from nsagen.aot.resources import Resources
from nsagen.cases.base import Sizes
from nsagen.codegen.template import default_schedule, render, space_for
from nsagen.core.target import KNOWN_TARGETS, Target
from nsagen.core.workload import Param, Workload, parameter_names

SHAPE: dict[str, Param] = {
    **{"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16, "block_size": 64, "topk": 16},
    **{"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "local_blocks": 2},
    **{"window_size": 512, "compress_type": "weightedpool", "with_pe": True},
}
MINICPM: dict[str, Param] = {
    **{"topk": 96, "local_blocks": 33, "window_size": 1, "score_pool": "max"},
}
MINIMAX: dict[str, Param] = {
    **{"gqa_ratio": 4, "kernel_size": 1, "kernel_stride": 1, "block_size": 128},
    **{"init_blocks": 0, "local_blocks": 1},
    **{"score_norm": "none", "score_heads": "each", "score_pool": "max"},
}
CALLS: dict[str, tuple[str, dict[str, Param]]] = {
    "cache_append": ("cache_append", {}),
    "cache_append linear": ("cache_append", {"compress_type": "linear"}),
    "cache_append mlp": ("cache_append", {"compress_type": "mlp", "mlp_hidden": 128}),
    "compressed_attention": ("compressed_attention", {}),
    "native_sparse_attention": ("native_sparse_attention", {}),
    "native_sparse_attention of 64 heads": ("native_sparse_attention", {"gqa_ratio": 64}),
    "MiniCPM4's attention": ("selected_attention", MINICPM),
    "MiniCPM4's selection": ("block_selection", MINICPM),
    "MiniMax-M3's selection": ("block_selection", MINIMAX),
    "MiniCPM4's means": ("pool_append", {}),
}
MULTIPLY = set(CALLS) - {"cache_append", "MiniCPM4's means"}


def kernels_of(name: str, target: Target, folder: Path, cache_dtype: str) -> tuple[Resources, ...]:
    """Those that a call of the default launches, compiled."""
    op, changes = CALLS[name]
    names = parameter_names(op, "decode")
    params = {n: value for n, value in (SHAPE | changes).items() if n in names}
    dtype = "float32" if op == "pool_append" else "bfloat16"
    work = Workload.of(op, "decode", dtype=dtype, cache_dtype=cache_dtype, **params)
    schedule = default_schedule(work, target)
    path = folder / f"{op}.py"
    path.write_text(render(work, schedule, header="# compiled"))
    found = compiled_resources(path, work, target)
    for one in found:
        assert not one.problems(target), one
    limit = space_for(work).memory_on(work, schedule, target)
    assert found[0].shared_bytes <= limit, found[0]
    return found


TARGETS = {"cuda:90": ("float8_e4m3fn", "int8"), "cuda:80": ("int8",)}
FIRST = ("cache_append", "compressed_attention", "native_sparse_attention")
PAIRS = [(target, narrow) for target, several in TARGETS.items() for narrow in several]
EVERY = [
    pytest.param(name, *pair, marks=[] if i == j else pytest.mark.slow)
    for i, name in enumerate(FIRST)
    for j, pair in enumerate(PAIRS)
]
"""The others only in float8 for Hopper: compiling takes a second each."""


@pytest.mark.parametrize(
    ("name", "target", "cache_dtype"),
    [*EVERY, *((name, "cuda:90", "float8_e4m3fn") for name in CALLS if name not in FIRST)],
)
def test_defaults_fit_and_use_no_stack(
    name: str, target: str, cache_dtype: str, tmp_path: Path
) -> None:
    found = kernels_of(name, KNOWN_TARGETS[target], tmp_path, cache_dtype)
    if name in FIRST:  # of the others, no loop uses it
        assert all(one.spill_bytes == 0 for one in found)
    assert any(one.matrix != "none" for one in found) == (name in MULTIPLY)


@pytest.mark.parametrize(
    "op", ["compressed_attention", "native_sparse_attention", "selected_attention"]
)
def test_float8_is_widened_by_few_instructions(op: str, tmp_path: Path) -> None:
    """Two numbers a conversion, and one byte permutation for two conversions.

    Products take numbers of several rows in one register. Gathering them byte by byte once took
    five instructions for two numbers, and the kernels waited for instructions, not for memory.
    """
    target = KNOWN_TARGETS["cuda:90"]
    names = parameter_names(op, "decode")
    params = {n: value for n, value in SHAPE.items() if n in names}
    work = Workload.of(op, "decode", dtype="bfloat16", cache_dtype="float8_e4m3fn", **params)
    path = tmp_path / f"{op}.py"
    path.write_text(render(work, default_schedule(work, target), header="# compiled"))
    sizes = Sizes((65535,) * 32, kv_heads=4, capacity=65536)
    first, *_ = recorded_launches(path, work, sizes)
    code, labels = instructions(compile_launch(first, target, op).asm["cubin"])
    start, end = max(loops(code, labels), key=lambda span: span[1] - span[0])
    counts = Counter(i.name.split(".")[0] for i in code if start <= i.address <= end)
    widened = sum("E4M3.UNPACK" in i.name for i in code if start <= i.address <= end)
    step = 64 * (128 + 128)  # numbers of keys and values
    assert widened == step // (2 * 64)  # by each thread of two warps
    assert counts["PRMT"] <= widened // 2 + 8
    assert counts["LDS"] <= widened // 4  # tiles move by LDSM
