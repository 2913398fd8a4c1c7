"""Windows of whole blocks, of which a query sees the tokens up to itself: plain kernels, and the
pipelines with their warps in random order."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nsagen.cases.base import Sizes, cases_of
from nsagen.codegen.template import space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, load_kernel

from .test_pipelines_on_cpu import on_cpu

SM90 = KNOWN_TARGETS["cuda:90"]


def workload(
    pass_: str, blocks: int, block_size: int, *, dtype: str = "float16", dim: int = 16, group: int
) -> Workload:
    sizes = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": group}
    window = {"window_size": blocks * block_size, "block_size": block_size}
    return Workload.of("sliding_window_attention", pass_, dtype=dtype, **sizes, **window)


def kernel(w: Workload, algorithm: str, **knobs: int) -> Any:
    default: Any = space_for(w, algorithm).default(w, SM90)
    return load_kernel(w, Schedule.of(algorithm, {**default, **knobs}))


@pytest.mark.parametrize(("blocks", "block_size"), [(1, 24), (3, 8), (2, 64), (40, 4)])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_plain_kernels(pass_: str, blocks: int, block_size: int) -> None:
    """Blocks that are shorter than a step, or longer, or that steps do not tile."""
    w = workload(pass_, blocks, block_size, group=3)
    module = kernel(w, "row_tiles" if pass_ == "forward" else "two_passes")
    case = cases_of(w).make_case(w, Sizes((100, 0, 5, 33), 1), kernel_device(), 1)
    check_case(module, case)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs its warps on the CPU")
@pytest.mark.parametrize(
    ("pass_", "blocks", "block_size", "group"),
    [
        ("forward", 3, 32, 16),
        ("forward", 1, 128, 4),
        ("forward", 5, 8, 16),
        ("backward", 3, 32, 16),
        ("backward", 1, 128, 16),
    ],
)
def test_pipelines(
    pass_: str, blocks: int, block_size: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = workload(pass_, blocks, block_size, dtype="bfloat16", dim=64, group=group)
    module = kernel(w, "warp_specialized")
    monkeypatch.setattr(module, "processors", lambda x: 2)
    on_cpu(monkeypatch, module)
    check_case(module, cases_of(w).make_case(w, Sizes((150, 0, 9), 1), "cpu", 1))
