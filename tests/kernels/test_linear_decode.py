"""The decode kernel of a linear layer against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import Case
from nsagen.cases.linear_decode import linear_case
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

pytestmark = pytest.mark.kernel

AROUND: list[dict[str, Any]] = [
    {},
    {"residual": True},
    {"swiglu": True},
    {"swiglu": True, "residual": True},
    {"sigmoid_from": 50},
]


def workload(dtype: str = "float32") -> Workload:
    return Workload.of("linear", "decode", dtype=dtype)


def case_of(w: Workload, rows: int, k: int, n: int, **around: Any) -> Case:
    return linear_case(w, rows, k, n, kernel_device(), seed=1, **around)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("around", AROUND, ids=lambda around: "-".join(around) or "plain")
def test_what_stands_around_the_product(dtype: str, around: dict[str, Any]) -> None:
    w = workload(dtype)
    check_case(load_kernel(w), case_of(w, 3, 192, 70, **around))


@pytest.mark.parametrize("rows", [1, 8, 9, 17, 33, 64])
def test_rows(rows: int) -> None:
    w = workload()
    check_case(load_kernel(w), case_of(w, rows, 64, 40, residual=True))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (8, 2), (300, 134), (256, 64)])
def test_sizes_that_no_tile_divides(k: int, n: int) -> None:
    w = workload("float16")
    check_case(load_kernel(w), case_of(w, 2, k, n, swiglu=n > 1, residual=True))


@pytest.mark.parametrize(
    ("block_n", "block_k", "columns", "num_warps", "num_stages"),
    [(16, 32, 16, 1, 2), (128, 64, 8, 8, 3)],
)
def test_schedules(
    block_n: int, block_k: int, columns: int, num_warps: int, num_stages: int
) -> None:
    w = workload("float16")
    schedule = Schedule.of(
        "stream_weights",
        block_n=block_n,
        block_k=block_k,
        columns=columns,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    check_case(load_kernel(w, schedule), case_of(w, 5, 100, 180, swiglu=True))


def test_rows_with_any_stride() -> None:
    w = workload()
    case = case_of(w, 3, 64, 40, residual=True)
    x, weight, residual, y, *rest = case.args
    assert isinstance(x, torch.Tensor)
    assert isinstance(residual, torch.Tensor)
    wide = torch.cat([x, x], 1)[:, :64]
    strided = torch.cat([residual, residual], 1)[:, :40]
    args = (wide, weight, strided, y, *rest)
    check_case(load_kernel(w), Case(args, case.outputs, case.expected, case.cost))


def test_a_wrong_call_is_refused() -> None:
    w = workload()
    launch = load_kernel(w).launch
    x, weight, _, y, *rest = case_of(w, 2, 64, 40).args
    with pytest.raises(ValueError, match="at most 64 rows; got 65"):
        launch(torch.zeros(65, 64), weight, None, y, *rest)
    with pytest.raises(ValueError, match="rows of x must be contiguous"):
        launch(x.T.contiguous().T, weight, None, y, *rest)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        launch(x, weight.T.contiguous().T, None, y, *rest)
