"""Sliding-window attention's forward kernel against the float64 reference."""

import pytest
import torch

from nsagen.harness.base import Case, Sizes
from nsagen.harness.sliding_window_attention import make_case
from nsagen.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 3, 90, 1, 17)  # empty, shorter than the window, longer


def workload(dtype="float32", dim=32, v_dim=None, group=2, window=40):
    return Workload.of(
        "sliding_window_attention",
        "forward",
        dtype=dtype,
        head_dim=dim,
        v_head_dim=v_dim or dim,
        gqa_ratio=group,
        window_size=window,
    )


def case_of(w: Workload, seqlens=RAGGED, kv_heads=2) -> Case:
    return make_case(w, Sizes(seqlens, kv_heads), kernel_device(), seed=1)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("group", [1, 2, 3, 16, 48])
def test_group_sizes(dtype, group):
    w = workload(dtype, group=group)
    check_case(load_kernel(w), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (64, 64), (128, 128), (24, 80), (192, 128)])
def test_head_sizes(dtype, dim, v_dim):
    w = workload(dtype, dim, v_dim)
    check_case(load_kernel(w), case_of(w, (33, 0, 50)))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 200, 1000])
def test_windows_of_any_size(window):
    w = workload(window=window)
    check_case(load_kernel(w), case_of(w, (250,), kv_heads=1))


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (16, 64), (64, 16), (128, 32)])
@pytest.mark.parametrize("window", [7, 100])
def test_schedules(group, block_m, block_n, window):
    """Every way in which a window splits into steps: with and without a middle and a rest."""
    w = workload(group=group, window=window)
    schedule = Schedule.of("row_tiles", block_m=block_m, block_n=block_n, num_warps=1, num_stages=2)
    check_case(load_kernel(w, schedule), case_of(w, (130, 20), kv_heads=1))


def test_a_query_sees_exactly_its_window():
    """With values that name their token, equal scores average the tokens of the window."""
    w = workload(window=5, group=1, dim=16)
    q, k, v, cu_seqlens, o, lse, scale = case_of(w, (40,), kv_heads=1).args
    q.zero_()
    v.copy_(torch.arange(40.0)[:, None, None].expand_as(v))
    load_kernel(w).launch(q, k, v, cu_seqlens, o, lse, scale)
    seen = [range(max(0, t - 4), t + 1) for t in range(40)]
    means = torch.tensor([sum(tokens) / len(tokens) for tokens in seen])
    counts = torch.tensor([float(len(tokens)) for tokens in seen])
    torch.testing.assert_close(o[:, 0, 0].cpu(), means)
    torch.testing.assert_close(lse[:, 0].cpu().exp(), counts)


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_views_with_any_token_and_head_strides(dtype):
    """q, k and v as slices of one projection, and k with heads outside tokens."""
    w = workload(dtype, group=3)
    case = case_of(w)
    q, k, v, *rest = case.args
    packed = torch.cat([q, k, v], 1)
    q = packed[:, : q.shape[1]]
    v = packed[:, -v.shape[1] :]
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    check_case(load_kernel(w), Case((q, k, v, *rest), case.outputs, case.expected, case.cost))


@pytest.mark.parametrize("magnitude", [0.0, 1e3])
def test_equal_and_huge_scores(magnitude):
    w = workload("float32")
    case = case_of(w)
    case.args[0].mul_(magnitude)
    check_case(load_kernel(w), case)


def test_nothing_to_do():
    w = workload()
    for seqlens in ((), (0,), (0, 0, 0)):
        load_kernel(w).launch(*case_of(w, seqlens).args)


def test_a_wrong_call_is_refused():
    w = workload()
    q, k, v, cu_seqlens, o, lse, scale = case_of(w).args
    launch = load_kernel(w).launch
    with pytest.raises(ValueError, match="gqa_ratio 2"):
        launch(q[:, :3], k, v, cu_seqlens, o, lse, scale)
    with pytest.raises(ValueError, match="last dimension"):
        launch(q, k.transpose(0, 2).contiguous().transpose(0, 2), v, cu_seqlens, o, lse, scale)
    with pytest.raises(ValueError, match="softmax_scale must be positive"):
        launch(q, k, v, cu_seqlens, o, lse, -scale)
