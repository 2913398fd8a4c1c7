"""Compression's backward kernels against the float64 reference's gradients."""

import pytest
import torch

from nsagen import ops
from nsagen.cases.base import Case, Sizes
from nsagen.cases.compress_backward import make_case
from nsagen.core.workload import COMPRESS_TYPES, Schedule, Workload
from nsagen.ops import reference
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 7, 50, 8, 1, 21, 0)  # empty, one token short of a window, long, exactly a window


def workload(
    kind="weightedpool", dtype="float32", dim=16, size=8, stride=4, with_pe=True, hidden=24
):
    return Workload.of(
        "compress",
        "backward",
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
@pytest.mark.parametrize("dim", [16, 24, 80, 128])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_head_sizes(kind, dtype, dim):
    w = workload(kind, dtype, dim, size=4, stride=2)
    check_case(load_kernel(w), case_of(w, (5, 0, 6), heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_the_largest_head_size(kind, dtype):
    w = workload(kind, dtype, 256)
    check_case(load_kernel(w), case_of(w))


@pytest.mark.parametrize(
    ("size", "stride"),
    [(32, 16), (4, 4), (1, 1), (12, 4), (12, 12), (40, 8), (32, 2), (128, 16), (9, 3)],
)
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_windows_of_any_size_and_stride(kind, size, stride):
    """From windows of one token to windows that share most of theirs."""
    w = workload(kind, dim=16, size=size, stride=stride)
    seqlens = (0, size - 1, size, size + 2 * stride + 1, 1)
    check_case(load_kernel(w), case_of(w, seqlens, heads=1))


@pytest.mark.parametrize(
    ("block_tokens", "block_windows", "block_j", "part_windows"),
    [(4, 64, 1, 64), (64, 4, 8, 64), (16, 8, 2, 128)],
)
@pytest.mark.parametrize("kind", ["avgpool", "weightedpool"])
def test_schedules_of_pool(kind, block_tokens, block_windows, block_j, part_windows):
    w = workload(kind, dim=32)
    schedule = Schedule.of(
        "pool",
        block_tokens=block_tokens,
        block_windows=block_windows,
        block_j=block_j if kind == "weightedpool" else 1,
        part_windows=part_windows,
        num_warps=1,
    )
    check_case(load_kernel(w, schedule), case_of(w, (300, 5, 77, 290), heads=1))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("dim", [32, 40])
@pytest.mark.parametrize(
    ("block_units", "tile", "max_parts"),
    [(16, (32, 16, 16, 32, 16), 1), (64, (16, 32, 32, 16, 32), 16)],
)
def test_schedules_of_matmul(dtype, dim, block_units, tile, max_parts):
    w = workload("linear", dtype, dim, size=4, stride=2)
    names = ("block_n", "block_k", "block_rows", "block_cols", "block_windows")
    schedule = Schedule.of(
        "matmul",
        dict(zip(names, tile, strict=True)),
        block_units=block_units,
        max_parts=max_parts,
        num_warps=2,
        num_stages=2,
    )
    check_case(load_kernel(w, schedule), case_of(w, (90, 3, 20), heads=1))


@pytest.mark.parametrize("seqlens", [(5,) * 17, (8,) * 9, (90,) + (9,) * 4, (3, 40), (4,)])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_batches_of_any_number(kind, seqlens):
    """Among them batches without any window, and ones that leave most rows of dy unused."""
    w = workload(kind, dim=16)
    check_case(load_kernel(w), case_of(w, seqlens, heads=1))


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_heads_of_any_number(kind):
    w = workload(kind, dim=16)
    for heads in (1, 3, 8):
        check_case(load_kernel(w), case_of(w, (9, 14), heads))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_views_with_any_token_and_head_strides(kind, dtype):
    """x as a slice of a larger projection, and x and dy with heads outside tokens."""
    w = workload(kind, dtype, 24)
    case = case_of(w, (9, 0, 21))
    dy, x, *rest = case.args
    sliced = torch.cat([x, x], 1)[:, x.shape[1] :]
    turned, turned_dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy))
    for views in ((dy, sliced), (turned_dy, turned)):
        for out in case.outputs.values():
            out.fill_(float("nan"))
        check_case(load_kernel(w), Case((*views, *rest), case.outputs, case.expected, case.cost))


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_tokens_in_no_window_reach_nothing(kind):
    """They may hold anything, and their own gradient is 0."""
    w = workload(kind)
    case = case_of(w, (10, 7, 11))  # windows cover 8 tokens, none, and 8
    clean = case.expected()
    for start, end in ((8, 10), (10, 17), (25, 28)):
        case.args[1][start:end] = float("nan")
        assert not clean["dx"][start:end].any()
    check_case(load_kernel(w), Case(case.args, case.outputs, lambda: clean, case.cost))


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_every_run_gives_the_same_bits(kind):
    w = workload(kind, "float16")
    case = case_of(w, (290, 90), heads=1)
    module = load_kernel(w)
    module.launch(*case.args)
    first = {name: out.clone() for name, out in case.outputs.items()}
    module.launch(*case.args)
    for name, out in case.outputs.items():
        assert torch.equal(out, first[name]), name


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_fewer_tokens_than_a_stride(kind):
    w = workload(kind)
    for seqlens in ((3,), (0,), (0, 0), (1, 1, 1), ()):
        check_case(load_kernel(w), case_of(w, seqlens))


@pytest.mark.parametrize("with_pe", [True, False])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_autograd_runs_the_kernels(kind, with_pe, tmp_path, monkeypatch):
    """Through the public op, with a dy that is expanded, as that of a sum is."""
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))
    w = workload(kind, dim=16, with_pe=with_pe)
    for seqlens in ((0, 30, 9), (3,)):  # the latter has fewer tokens than a stride
        _, x, weight, pe, cu_seqlens, *_ = case_of(w, seqlens).args
        second = [torch.randn(2, 24, 16, device=x.device)] if kind == "mlp" else []
        given = [t for t in (x, weight, *second, pe) if t is not None]
        found, expected = [], []
        for op, dtype, gradients in (
            (ops.compress, torch.float32, found),
            (reference.compress, torch.float64, expected),
        ):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
            rest = iter(leaves)
            x_in = next(rest)
            w_in = tuple(next(rest) for _ in range(2)) if second else None
            if weight is not None and not second:
                w_in = next(rest)
            inputs = [x_in, w_in, None if pe is None else next(rest)]
            sizes = {"compress_type": kind, "kernel_size": 8, "kernel_stride": 4}
            y, _ = op(*inputs, cu_seqlens, **sizes)
            y.sum().backward()
            gradients += [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert list(tmp_path.rglob("compress_backward__*.py"))


def test_a_wrong_call_is_refused():
    w = workload()
    dy, x, weight, pe, *offsets, dx, dw, dpe = case_of(w).args
    launch = load_kernel(w).launch
    with pytest.raises(ValueError, match=r"needs w \(2, 8\); got None"):
        launch(dy, x, None, pe, *offsets, dx, dw, dpe)
    with pytest.raises(ValueError, match="needs dpe"):
        launch(dy, x, weight, pe, *offsets, dx, dw, None)
    with pytest.raises(ValueError, match="needs dy "):
        launch(dy[:-1], x, weight, pe, *offsets, dx, dw, dpe)
    turned = dy.transpose(0, 2).contiguous().transpose(0, 2)
    with pytest.raises(ValueError, match="last dimension"):
        launch(turned, x, weight, pe, *offsets, dx, dw, dpe)
