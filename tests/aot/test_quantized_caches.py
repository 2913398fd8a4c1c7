"""Kernels on caches of a narrow dtype, compiled: they fit, and multiply by matrix instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.aot.resources import Resources, read_resources
from nsagen.codegen.template import default_schedule, render, space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Param, Workload, parameter_names

SHAPE: dict[str, Param] = {
    **{"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16, "block_size": 64, "topk": 16},
    **{"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "local_blocks": 2},
    **{"window_size": 512, "compress_type": "weightedpool", "with_pe": True},
}
OPS = ("cache_append", "compressed_attention", "native_sparse_attention")


def first_kernel(op: str, target_name: str, folder: Path, cache_dtype: str) -> Resources:
    """Of the default of a usual shape, compiled."""
    names = parameter_names(op, "decode")
    params = {n: value for n, value in SHAPE.items() if n in names}
    work = Workload.of(op, "decode", dtype="bfloat16", cache_dtype=cache_dtype, **params)
    target = KNOWN_TARGETS[target_name]
    schedule = default_schedule(work, target)
    path = folder / f"{op}.py"
    path.write_text(render(work, schedule, header="# compiled"))
    call = recorded_launches(path, work)[0]
    found = read_resources(op, compile_launch(call, target, "quantized"), target)
    assert not found.problems(target), found
    assert found.shared_bytes <= space_for(work).memory_on(work, schedule, target), found
    return found


@pytest.mark.parametrize(
    ("target", "cache_dtype"),
    [("cuda:90", "float8_e4m3fn"), ("cuda:90", "int8"), ("cuda:80", "int8")],
)
@pytest.mark.parametrize("op", OPS)
def test_defaults_fit_and_use_no_stack(
    op: str, target: str, cache_dtype: str, tmp_path: Path
) -> None:
    found = first_kernel(op, target, tmp_path, cache_dtype)
    assert found.spill_bytes == 0
    if op != "cache_append":
        assert found.matrix == "mma.sync"
