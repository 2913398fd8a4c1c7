"""Rows of caches of a narrow dtype, gathered and widened in one pass."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import CACHE_DTYPES
from nsagen.ops import reference
from nsagen.ops.reference import dequantize, quantize
from tests.support import kernel_device

from .fixed_kernels import compile_fixed

NARROW = [getattr(torch, name) for name in CACHE_DTYPES]
TABLE = torch.tensor([[4, 0, 2], [5, 1, 3], [6, 8, 7]], dtype=torch.int32)
POSITIONS = torch.tensor([0, 3, -1, 11, 4, 9, 2], dtype=torch.int32)
SLOTS = torch.tensor([1, 1, 0, 2, 2, 0, 0], dtype=torch.int32)


def filled(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """A cache of rows of very different sizes, one of them NaN; scales lie heads before entries."""
    torch.manual_seed(0)
    x = torch.randn(shape) * 10.0 ** torch.arange(-3, shape[1] - 3)[:, None, None]
    x[1, 3, 1, 5] = torch.nan
    cache, scale = quantize(x, dtype)
    return cache, scale.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=CACHE_DTYPES)
def test_a_row_is_what_dequantize_makes_of_it(dtype: torch.dtype, wide: torch.dtype) -> None:
    cache, scale = filled(dtype, 3, 12, 2, 24)
    found = ops.load_rows(cache, scale, POSITIONS, SLOTS, wide)
    assert found.dtype == wide
    expected = dequantize(cache, scale)[SLOTS.long(), POSITIONS.long()].to(wide)
    expected[2] = 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.kernel
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=CACHE_DTYPES)
def test_kernel_and_reference_load_the_same(
    dtype: torch.dtype, paged: bool, wide: torch.dtype
) -> None:
    """Bit for bit, of a part of a longer cache too."""
    places = POSITIONS.to(kernel_device()), SLOTS.to(kernel_device())
    table = TABLE.to(kernel_device()) if paged else None
    for heads in (2, 3):
        sizes = (9, 6, heads, 24) if paged else (3, 14, heads, 24)
        cache, scale = (x.to(kernel_device()) for x in filled(dtype, *sizes))
        if paged:
            cache, scale = cache[:, :4].clone(), scale[:, :4]
        else:
            cache, scale = cache[:, 1:13], scale[:, 1:13]
        found = ops.load_rows(cache, scale, *places, wide, block_table=table)
        expected = reference.load_rows(cache, scale, *places, wide, block_table=table)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert bool((found[2] == 0).all())


def test_no_rows() -> None:
    cache, scale = filled(torch.int8, 3, 12, 2, 24)
    none = torch.zeros(0, dtype=torch.int32)
    assert ops.load_rows(cache, scale, none, none, torch.float32).shape == (0, 2, 24)


def test_float16_is_refused() -> None:
    cache, scale = filled(torch.int8, 3, 12, 2, 24)
    with pytest.raises(InvalidInputError, match=r"bfloat16, float32 or float64,.*float16"):
        ops.load_rows(cache, scale, POSITIONS, SLOTS, torch.float16)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize("x", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("backend", "arch", "narrow"),
    [("cuda", 80, "i8"), ("cuda", 90, "fp8e4nv"), ("hip", "gfx942", "i8")],
)
def test_its_kernel_compiles(backend: str, arch: Any, narrow: str, x: str) -> None:
    constants: dict[str, Any] = {"HEAD_DIM": 128, "BLOCK_D": 128, "TILE": 8, "PAGE_SIZE": 64}
    types = {"x": f"*{x}", "cache": f"*{narrow}", "scale": "*fp32"}
    types |= dict.fromkeys(("positions", "slots", "block_table"), "*i32")
    assert compile_fixed("load_rows_kernel", types, constants, backend, arch).asm


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize("launch", ["load", "store"])
def test_a_cache_that_grows_compiles_nothing_anew(launch: str) -> None:
    """The length of a slot is no constant of either kernel; that of a page is."""
    pytest.importorskip("triton")
    from nsagen.aot.compile import recording
    from nsagen.ops import _fixed_kernels

    sizes: list[dict[str, Any]] = []
    for length in (64, 72):
        cache, scale = (t.to("meta") for t in filled(torch.int8, 4, length, 2, 24))
        given = torch.empty(5, 2, 24, device="meta"), cache, scale
        with recording(importlib.reload(_fixed_kernels)) as calls:
            places = torch.zeros(2, 5, dtype=torch.int32, device="meta")
            getattr(_fixed_kernels, f"launch_{launch}_rows")(*given, *places)
        sizes.append({n: value for n, value in calls[0].args.items() if n.isupper()})
    assert sizes[0] == sizes[1]
