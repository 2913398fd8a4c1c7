"""Compression's forward kernels against the float64 reference."""

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.compress import make_case
from nsagen.core.workload import COMPRESS_TYPES, Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 7, 150, 8, 1, 21, 0)  # empty, one token short of a window, long, exactly a window
POOLS = ("avgpool", "weightedpool")


def workload(
    kind="weightedpool", dtype="float32", dim=32, size=8, stride=4, with_pe=True, hidden=24
):
    return Workload.of(
        "compress",
        "forward",
        dtype=dtype,
        compress_type=kind,
        head_dim=dim,
        kernel_size=size,
        kernel_stride=stride,
        with_pe=with_pe,
        mlp_hidden=hidden,
    )


def case_of(w: Workload, seqlens=RAGGED, heads=2) -> Case:
    return make_case(w, Sizes(seqlens, heads), kernel_device(), seed=1)


@pytest.mark.parametrize("with_pe", [True, False])
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_compress_types(kind, dtype, with_pe):
    w = workload(kind, dtype, with_pe=with_pe)
    check_case(load_kernel(w), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("dim", [16, 24, 80, 128, 256])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_head_sizes(kind, dtype, dim):
    w = workload(kind, dtype, dim)
    check_case(load_kernel(w), case_of(w, (33, 0, 50)))


@pytest.mark.parametrize(
    ("size", "stride"), [(32, 16), (4, 4), (1, 1), (12, 4), (12, 12), (40, 8), (16, 2), (32, 1)]
)
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_windows_of_any_size_and_stride(kind, size, stride):
    w = workload(kind, dim=16, size=size, stride=stride)
    check_case(load_kernel(w), case_of(w, (0, size - 1, size, 5 * size + 3, 1)))


@pytest.mark.parametrize(
    ("block_units", "unroll", "num_warps"), [(4, 4, 1), (16, 1, 2), (64, 2, 8)]
)
@pytest.mark.parametrize(("size", "stride"), [(4, 4), (8, 4), (12, 4)])
@pytest.mark.parametrize("kind", POOLS)
def test_schedules_of_pool(kind, size, stride, block_units, unroll, num_warps):
    w = workload(kind, size=size, stride=stride)
    schedule = Schedule.of("pool", block_units=block_units, unroll=unroll, num_warps=num_warps)
    check_case(load_kernel(w, schedule), case_of(w))


@pytest.mark.parametrize(("block_windows", "unroll"), [(4, 8), (16, 1), (64, 4)])
@pytest.mark.parametrize("with_pe", [True, False])
@pytest.mark.parametrize("kind", POOLS)
def test_schedules_of_reread(kind, with_pe, block_windows, unroll):
    w = workload(kind, with_pe=with_pe)
    schedule = Schedule.of("reread", block_windows=block_windows, unroll=unroll, num_warps=1)
    check_case(load_kernel(w, schedule), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("dim", [32, 80])
@pytest.mark.parametrize(
    ("block_m", "block_n", "block_k"), [(16, 32, 16), (64, 32, 16), (32, 16, 32)]
)
def test_schedules_of_matmul(dtype, dim, block_m, block_n, block_k):
    w = workload("linear", dtype, dim)
    tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
    schedule = Schedule.of("matmul", tile, num_warps=2, num_stages=2)
    check_case(load_kernel(w, schedule), case_of(w, (60, 3, 21)))


@pytest.mark.parametrize("seqlens", [(5,) * 20, (8,) * 17, (300,) + (9,) * 9, (3, 40), (4,)])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_spare_rows_are_zero_and_none_is_missed(kind, seqlens):
    """Batches of short sequences leave many rows without a window."""
    w = workload(kind, dim=16)
    case = case_of(w, seqlens)
    check_case(load_kernel(w), case)
    rows = int(case.args[4][-1])
    assert not case.outputs["y"][rows:].any()


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_heads_of_any_number(kind):
    w = workload(kind)
    for heads in (1, 3, 8):
        check_case(load_kernel(w), case_of(w, (40, 9), heads))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_views_with_any_token_and_head_strides(kind, dtype):
    """x as a slice of a larger projection, and with heads outside tokens."""
    w = workload(kind, dtype, 24)
    case = case_of(w)
    x, *rest = case.args
    sliced = torch.cat([x, x], 1)[:, x.shape[1] :]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (sliced, turned):
        case.outputs["y"].fill_(float("nan"))
        check_case(load_kernel(w), Case((view, *rest), case.outputs, case.expected, case.cost))


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_a_window_reads_only_its_tokens(kind):
    """Tokens that no window covers may hold anything."""
    w = workload(kind)
    case = case_of(w, (10, 7, 11))  # windows cover 8 tokens, none, and 8
    x = case.args[0]
    clean = case.expected()["y"]
    for start, end in ((8, 10), (10, 17), (25, 28)):
        x[start:end] = float("nan")
    check_case(load_kernel(w), Case(case.args, case.outputs, lambda: {"y": clean}, case.cost))


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_fewer_tokens_than_a_stride(kind):
    w = workload(kind)
    for seqlens in ((3,), (0,), (0, 0), (1, 1, 1)):
        load_kernel(w).launch(*case_of(w, seqlens).args)


def test_a_wrong_call_is_refused():
    w = workload()
    x, weight, pe, cu_seqlens, y_cu_seqlens, y = case_of(w).args
    launch = load_kernel(w).launch
    with pytest.raises(ValueError, match=r"needs w \(2, 8\); got None"):
        launch(x, None, pe, cu_seqlens, y_cu_seqlens, y)
    with pytest.raises(ValueError, match="needs pe"):
        launch(x, weight, None, cu_seqlens, y_cu_seqlens, y)
    with pytest.raises(ValueError, match="needs y "):
        launch(x, weight, pe, cu_seqlens, y_cu_seqlens, y[:-1])
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    with pytest.raises(ValueError, match="last dimension"):
        launch(turned, weight, pe, cu_seqlens, y_cu_seqlens, y)
