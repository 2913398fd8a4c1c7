"""The gated sum's backward kernel against the float64 reference's gradients."""

import pytest
import torch

from nsagen import ops
from nsagen.cases.base import Case, Sizes
from nsagen.cases.gated_sum_backward import make_case
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel


def workload(dtype="float32", dim=32):
    return Workload.of("gated_sum", "backward", dtype=dtype, v_head_dim=dim)


def case_of(w: Workload, tokens=37, heads=6) -> Case:
    return make_case(w, Sizes((tokens,), heads), kernel_device(), seed=1)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 256])
def test_head_sizes(dtype, dim):
    w = workload(dtype, dim)
    check_case(load_kernel(w), case_of(w))


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 64), (200, 1), (33, 48), (16, 16)])
def test_tokens_and_heads_of_any_number(tokens, heads):
    w = workload("float16", 64)
    check_case(load_kernel(w), case_of(w, tokens, heads))


@pytest.mark.parametrize(("block_rows", "num_warps"), [(4, 1), (32, 8), (64, 4)])
def test_schedules(block_rows, num_warps):
    w = workload(dim=32)
    schedule = Schedule.of("row_tiles", block_rows=block_rows, num_warps=num_warps)
    check_case(load_kernel(w, schedule), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_float32_gates(dtype):
    """Gates in float32 have gradients in float32, whatever the branches are in."""
    w = workload(dtype)
    case = case_of(w)
    args = list(case.args)
    args[4] = args[4].float()
    args[8] = torch.full_like(args[4], float("nan"))
    outputs = {**case.outputs, "dgate": args[8]}
    check_case(load_kernel(w), Case(tuple(args), outputs, case.expected, case.cost))


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_views_with_any_token_and_head_strides(dtype):
    """do and two branches as slices of one tensor, one with heads outside tokens."""
    w = workload(dtype, 24)
    case = case_of(w)
    do, a, b, c, gate, *gradients = case.args
    heads = a.shape[1]
    packed = torch.cat([do, a, b], 1)
    do, a, b = packed[:, :heads], packed[:, heads : 2 * heads], packed[:, 2 * heads :]
    c = c.transpose(0, 1).contiguous().transpose(0, 1)
    gate = torch.cat([gate, gate], 2)[..., :3]
    args = (do, a, b, c, gate, *gradients)
    check_case(load_kernel(w), Case(args, case.outputs, case.expected, case.cost))


def test_a_gradient_that_is_expanded():
    """What the sum of an output hands back: one element with strides of 0 between rows."""
    w = workload()
    case = case_of(w)
    do = case.args[0][:1, :1].expand(*case.args[0].shape)
    case.args[0].copy_(do.clone())
    args = (do, *case.args[1:])
    check_case(load_kernel(w), Case(args, case.outputs, case.expected, case.cost))


def test_autograd_runs_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))
    inputs = case_of(workload()).args[1:5]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    ops.gated_sum(*ours).sum().backward()
    reference.gated_sum(*theirs).sum().backward()
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)
    assert list(tmp_path.rglob("gated_sum_backward__*.py"))


def test_the_same_bits_every_time():
    w = workload("float16", 64)
    case = case_of(w, 200, 16)
    kernel = load_kernel(w)
    found = []
    for _ in range(5):
        for x in case.outputs.values():
            x.fill_(float("nan"))
        kernel.launch(*case.args)
        found.append([x.clone() for x in case.outputs.values()])
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


def test_no_tokens():
    w = workload()
    load_kernel(w).launch(*case_of(w, 0).args)


def test_a_wrong_call_is_refused():
    w = workload()
    do, a, b, c, gate, *gradients, dgate = case_of(w).args
    launch = load_kernel(w).launch
    with pytest.raises(ValueError, match=r"gradients \[N, HQ, 32\]"):
        launch(do, a, b[:3], c, gate, *gradients, dgate)
    with pytest.raises(ValueError, match="gate and dgate must be"):
        launch(do, a, b, c, gate[..., :2], *gradients, dgate)
    with pytest.raises(ValueError, match="last dimension"):
        launch(do, a, b, c.transpose(0, 2).contiguous().transpose(0, 2), gate, *gradients, dgate)
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(do, a, b, c, gate, a.transpose(0, 1).contiguous().transpose(0, 1), b, c, dgate)
