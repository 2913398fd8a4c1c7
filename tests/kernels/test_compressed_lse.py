"""The log-sum-exp kernel against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import Sizes, relative_error
from nsagen.cases.compressed_lse import make_case
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

# Shorter than a window, exactly one, empty, one long sequence and many short ones.
RAGGED = (7, 8, 0, 99, 9, 1, 12)
# Tiles small enough that short sequences take unmasked steps too.
SMALL = Schedule.of("row_tiles", block_m=32, block_n=16, num_warps=2, num_stages=2)


def workload_of(dtype: str = "float16", **params: Any) -> Workload:
    shape = {"head_dim": 32, "gqa_ratio": 2, "kernel_size": 8, "kernel_stride": 4} | params
    return Workload.of("compressed_lse", "forward", dtype=dtype, **shape)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("gqa_ratio", [1, 3, 16])
def test_groups(gqa_ratio: int, dtype: str) -> None:
    workload = workload_of(dtype, gqa_ratio=gqa_ratio)
    case = make_case(workload, Sizes((7, 8, 0, 75, 12), 1), kernel_device())
    check_case(load_kernel(workload, SMALL), case)


@pytest.mark.parametrize("head_dim", [16, 24, 80, 192])
def test_head_sizes(head_dim: int) -> None:
    workload = workload_of(head_dim=head_dim)
    check_case(load_kernel(workload, SMALL), make_case(workload, Sizes(RAGGED), kernel_device()))


@pytest.mark.parametrize(("kernel_size", "kernel_stride"), [(1, 1), (8, 1), (32, 16), (128, 64)])
def test_windows(kernel_size: int, kernel_stride: int) -> None:
    workload = workload_of(kernel_size=kernel_size, kernel_stride=kernel_stride)
    lengths = (kernel_size - 1, kernel_size, 0, 150, kernel_size + kernel_stride)
    check_case(load_kernel(workload, SMALL), make_case(workload, Sizes(lengths), kernel_device()))


@pytest.mark.parametrize("dtype", kernel_dtypes()[:2])
def test_large_scores(dtype: str) -> None:
    """Scores in the thousands, far past what an exponential holds."""
    workload = workload_of(dtype)
    case = make_case(workload, Sizes((70,)), kernel_device())
    q = case.args[0]
    assert isinstance(q, torch.Tensor)
    q.mul_(1000)
    check_case(load_kernel(workload, SMALL), case)


def test_chunks_of_a_prompt() -> None:
    """The last queries of a sequence, with their position, get what the whole gets."""
    workload = workload_of()
    case = make_case(workload, Sizes((99,)), kernel_device())
    q, k, _, k_ends, lse, scale = case.args
    assert isinstance(q, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    ends, start = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([0, 40], [59]))
    part = torch.empty_like(lse[:40])
    load_kernel(workload, SMALL).launch(q[59:], k, ends, k_ends, part, scale, start)
    assert relative_error(part, case.expected()["lse"][59:]) < 1e-5


def test_it_normalizes_compressed_attention() -> None:
    """The same number as the attention's own."""
    workload = workload_of("float32")
    case = make_case(workload, Sizes(RAGGED), kernel_device())
    q, k, *ends, lse, scale = case.args
    load_kernel(workload, SMALL).launch(*case.args)
    windows = {"kernel_size": 8, "kernel_stride": 4}
    _, expected = reference.compressed_attention_forward(
        q, k, k, *ends, **windows, softmax_scale=scale
    )
    assert isinstance(lse, torch.Tensor)
    assert relative_error(lse, expected) < 1e-5
