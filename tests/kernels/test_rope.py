"""Rope's forward kernel against the float64 reference."""

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.rope import make_case
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 3, 40, 1, 17)


def workload(dtype="float32", dim=32):
    return Workload.of("rope", "forward", dtype=dtype, head_dim=dim)


def case_of(w: Workload, seqlens=RAGGED, heads=6) -> Case:
    return make_case(w, Sizes(seqlens, heads), kernel_device(), seed=1)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 256])
def test_head_sizes(dtype, dim):
    w = workload(dtype, dim)
    check_case(load_kernel(w), case_of(w))


@pytest.mark.parametrize("heads", [1, 3, 16, 48])
@pytest.mark.parametrize("seqlens", [(1,), (200,), (5, 0, 28)])
def test_tokens_and_heads_of_any_number(seqlens, heads):
    w = workload("float16", 64)
    check_case(load_kernel(w), case_of(w, seqlens, heads))


@pytest.mark.parametrize(("block_rows", "num_warps"), [(8, 1), (64, 8), (256, 4)])
def test_schedules(block_rows, num_warps):
    w = workload()
    schedule = Schedule.of("row_tiles", block_rows=block_rows, num_warps=num_warps)
    check_case(load_kernel(w, schedule), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("dim", [24, 32])
def test_views_with_any_token_and_head_strides(dtype, dim):
    w = workload(dtype, dim)
    case = case_of(w)
    x, *rest = case.args
    sliced = torch.cat([x, x], 1)[:, : x.shape[1]]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (sliced, turned):
        case.outputs["y"].fill_(float("nan"))
        check_case(load_kernel(w), Case((view, *rest), case.outputs, case.expected, case.cost))


def test_position_zero_is_no_turn():
    w = workload()
    x, cos, sin, positions, y = case_of(w).args
    cos[0], sin[0] = 1, 0
    load_kernel(w).launch(x, cos, sin, torch.zeros_like(positions), y)
    assert torch.equal(y, x)


def test_a_turn_back_undoes_a_turn():
    """The backward pass is a forward pass with the sines' sign changed."""
    w = workload()
    x, cos, sin, positions, y = case_of(w).args
    back = torch.empty_like(x)
    load_kernel(w).launch(x, cos, sin, positions, y)
    load_kernel(w).launch(y, cos, -sin, positions, back)
    torch.testing.assert_close(back, x)


def test_no_tokens():
    w = workload()
    load_kernel(w).launch(*case_of(w, (0,)).args)


def test_a_wrong_call_is_refused():
    w = workload()
    x, cos, sin, positions, y = case_of(w).args
    launch = load_kernel(w).launch
    with pytest.raises(ValueError, match=r"for x and y \[N, H, 32\]"):
        launch(x[..., :16], cos, sin, positions, y)
    with pytest.raises(ValueError, match="cos and sin must be"):
        launch(x, cos[:, :8], sin, positions, y)
    with pytest.raises(ValueError, match="last dimension"):
        launch(x.transpose(0, 2).contiguous().transpose(0, 2), cos, sin, positions, y)
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(x, cos, sin, positions, y.transpose(0, 1).contiguous().transpose(0, 1))
