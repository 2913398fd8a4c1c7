"""Pooling the windows that new tokens complete, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest

from nsagen.cases.base import Sizes
from nsagen.cases.pool_append_decode import make_case
from nsagen.core.workload import CACHE_DTYPES, Schedule, Workload
from tests.float8_interpreter import round_to_float8
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

# Idle, the first token, before, at and after a window's end, longer ones.
POSITIONS = (-1, 0, 6, 7, 8, 30, 61)
SMALL = Schedule.of("windows", step_tokens=8, num_warps=1)


def workload_of(dtype: str = "float32", **params: Any) -> Workload:
    shape = {"head_dim": 24, "kernel_size": 8, "kernel_stride": 4, **params}
    return Workload.of("pool_append", "decode", dtype=dtype, **shape)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("new_tokens", [1, 4, 19, 64])
def test_new_tokens(new_tokens: int, dtype: str) -> None:
    """One that may complete a window, a whole stride, several windows, all of them."""
    sizes = Sizes(POSITIONS, capacity=64)
    case = make_case(workload_of(dtype), sizes, kernel_device(), new_tokens=new_tokens)
    check_case(load_kernel(workload_of(dtype), SMALL), case)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (12, 4), (5, 1)], ids=str)
def test_windows(shape: tuple[int, int]) -> None:
    workload = workload_of(kernel_size=shape[0], kernel_stride=shape[1])
    case = make_case(workload, Sizes(POSITIONS, capacity=64), kernel_device())
    check_case(load_kernel(workload, SMALL), case)


@pytest.mark.parametrize("page_size", [4, 16])
def test_pages(page_size: int) -> None:
    sizes = Sizes(POSITIONS, capacity=64, page_size=page_size)
    case = make_case(workload_of(), sizes, kernel_device())
    check_case(load_kernel(workload_of(), SMALL), case)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_quantized_caches(
    cache_dtype: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means of the keys that the cache gives back, each with a scale of its own."""
    if kernel_device() == "cpu":
        round_to_float8(monkeypatch)
    work = workload_of(cache_dtype=cache_dtype)
    sizes = Sizes(POSITIONS, capacity=64, page_size=page_size)
    check_case(load_kernel(work, SMALL), make_case(work, sizes, kernel_device()))
