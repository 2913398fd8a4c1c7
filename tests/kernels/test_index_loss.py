"""The index loss's kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

PASSES = ("forward", "backward")
# Empty, one token, within a block, several blocks.
RAGGED = (0, 1, 9, 37)
SCHEDULES = {
    "forward": Schedule.of("query_major", block_n=16, num_warps=4, num_stages=1),
    "backward": Schedule.of(
        "two_passes", block_n=16, num_warps=4, num_stages=1, key_tile=16, key_warps=4, row_heads=1
    ),
}


def workload_of(pass_: str, dtype: str = "float32", **params: Any) -> Workload:
    shape = {"head_dim": 16, "index_head_dim": 16, "gqa_ratio": 2, "block_size": 16, **params}
    return Workload.of("index_loss", pass_, dtype=dtype, **shape)


def check(workload: Workload, seqlens: tuple[int, ...] = RAGGED, **sizes: Any) -> None:
    given = Sizes(seqlens, **{"kv_heads": 1, **sizes})
    case = cases_of(workload).make_case(workload, given, kernel_device())
    check_case(load_kernel(workload, SCHEDULES[workload.pass_]), case)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_dtypes(pass_: str, dtype: str) -> None:
    check(workload_of(pass_, dtype), (0, 1, 9, 20), kv_heads=2)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "change",
    [
        {"gqa_ratio": 1},
        {"gqa_ratio": 5},
        {"head_dim": 24, "index_head_dim": 40},
        {"block_size": 24},
    ],
    ids=str,
)
def test_shapes(pass_: str, change: dict[str, int]) -> None:
    """Groups and sizes that are no powers of two; blocks of several steps, and parts of one."""
    check(workload_of(pass_, **change), (3, 37))


@pytest.mark.parametrize("pass_", PASSES)
def test_a_selection_is_a_set(pass_: str) -> None:
    """In any order, with repeats and entries that name no block."""
    check(workload_of(pass_), (5, 37), any_order=True)


@pytest.mark.parametrize("scale", [2.0**18, 2.0**-20], ids=["scaled", "mean of many tokens"])
def test_float16_gradients_of_any_weight_of_the_loss(scale: float) -> None:
    """What a loss of float16 is multiplied by is neither past dx's range nor below it."""
    workload = workload_of("backward", "float16")
    case = cases_of(workload).make_case(workload, Sizes((37,), 1), kernel_device())
    plain = {name: x.double() for name, x in case.expected().items()}
    dloss = case.args[6]
    dloss *= scale
    found = {name: torch.empty_like(x, dtype=torch.float32) for name, x in case.outputs.items()}
    load_kernel(workload, SCHEDULES["backward"]).launch(
        *case.args[:9], *found.values(), *case.args[11:]
    )
    for name, x in found.items():
        assert relative_error(x.double() / scale, plain[name]) < THRESHOLDS[torch.float16]


def test_the_same_input_gives_the_same_bits() -> None:
    workload = workload_of("backward", "float16")
    case = cases_of(workload).make_case(workload, Sizes((37,), 1), kernel_device())
    kernel = load_kernel(workload, SCHEDULES["backward"])
    found = []
    for _ in range(2):
        kernel.launch(*case.args)
        found.append([x.clone() for x in case.outputs.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
