"""Rows in caches of a narrow dtype: each has its own scale, whatever comes with it."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.workload import CACHE_DTYPES
from nsagen.ops.reference import dequantize, quantize
from tests.float8_interpreter import round_to_float8

from .fixed_kernels import compile_fixed

NARROW = [getattr(torch, name) for name in CACHE_DTYPES]


def cache_of(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """A cache and its scales, which lie with heads before entries; no entry was written."""
    scale = torch.full((shape[0], shape[2], shape[1]), -1.0).transpose(1, 2)
    return torch.zeros(shape, dtype=dtype), scale


def rows_of(count: int) -> Tensor:
    """float32 [count, 2, 24] of very different sizes; one has a NaN."""
    torch.manual_seed(count)
    x = torch.randn(count, 2, 24) * 10.0 ** torch.arange(-3, count - 3)[:, None, None]
    x[1, 1, 5] = torch.nan
    return x


@pytest.mark.interpreter
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=CACHE_DTYPES)
def test_kernel_and_reference_store_the_same(
    dtype: torch.dtype, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and nothing else is written; rows that are idle are skipped."""
    round_to_float8(monkeypatch)
    x = rows_of(7)
    positions = torch.tensor([0, 3, -1, 11, 4, 9, 2], dtype=torch.int32)
    slots = torch.tensor([1, 1, 0, 2, 2, 0, 0], dtype=torch.int32)
    table = torch.tensor([[4, 0, 2], [5, 1, 3], [6, 8, 7]], dtype=torch.int32) if paged else None
    shape = (9, 4, 2, 24) if paged else (3, 12, 2, 24)
    (cache, scale), (other, other_scale) = cache_of(dtype, *shape), cache_of(dtype, *shape)
    ops.store_rows(x, cache, scale, positions, slots, block_table=table)
    given = (x, other, other_scale, positions, slots)
    ops.reference.store_rows(*given, block_table=table)
    torch.testing.assert_close(scale, other_scale, rtol=0, atol=0, equal_nan=True)
    real = scale.isfinite()  # a scale of NaN says all of its row
    assert torch.equal(cache.view(torch.int8)[real], other.view(torch.int8)[real])
    assert int((scale != -1).sum()) == 2 * 6


@pytest.mark.parametrize("dtype", NARROW, ids=CACHE_DTYPES)
def test_a_row_is_what_quantize_makes_of_it(dtype: torch.dtype) -> None:
    x = rows_of(5)
    cache, scale = cache_of(dtype, 2, 8, 2, 24)
    positions, slots = torch.arange(5).int(), torch.ones(5, dtype=torch.int32)
    ops.reference.store_rows(x, cache, scale, positions, slots)
    found, expected = dequantize(cache[1, :5], scale[1, :5]), dequantize(*quantize(x, dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert bool((cache[0].float() == 0).all())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize(
    ("backend", "arch", "narrow"),
    [("cuda", 80, "i8"), ("cuda", 90, "fp8e4nv"), ("hip", "gfx942", "i8")],
)
def test_its_kernel_compiles(backend: str, arch: Any, narrow: str) -> None:
    constants: dict[str, Any] = {"HEAD_DIM": 128, "BLOCK_D": 128, "TILE": 8, "PAGE_SIZE": 64}
    constants |= {"LIMIT": 127 if narrow == "i8" else 448, "INTEGERS": narrow == "i8"}
    types = {"x": "*bf16", "cache": f"*{narrow}", "scale": "*fp32"}
    types |= dict.fromkeys(("positions", "slots", "block_table"), "*i32")
    assert compile_fixed("store_rows_kernel", types, constants, backend, arch).asm


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
def test_a_launch_depends_on_shapes_alone() -> None:
    """On the meta device nothing has a value: a graph that captured the launch fits any rows."""
    pytest.importorskip("triton")
    from nsagen.aot.compile import recording
    from nsagen.ops import _fixed_kernels

    cache, scale = cache_of(torch.int8, 4, 64, 2, 24)
    indices = torch.zeros(2, 5, dtype=torch.int32)
    with recording(importlib.reload(_fixed_kernels)) as calls:
        given = (rows_of(5), cache, scale, *indices)
        _fixed_kernels.launch_store_rows(*(x.to("meta") for x in given))
    assert [call.grid for call in calls] == [(2,)]
