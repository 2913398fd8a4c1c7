"""The gated sum's forward kernel against the float64 reference."""

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.gated_sum import make_case
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel


def workload(dtype="float32", dim=32):
    return Workload.of("gated_sum", "forward", dtype=dtype, v_head_dim=dim)


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


@pytest.mark.parametrize(("block_rows", "num_warps"), [(4, 1), (64, 8), (256, 4)])
def test_schedules(block_rows, num_warps):
    w = workload(dim=32)
    schedule = Schedule.of("row_tiles", block_rows=block_rows, num_warps=num_warps)
    check_case(load_kernel(w, schedule), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_float32_gates(dtype):
    w = workload(dtype)
    case = case_of(w)
    args = list(case.args)
    args[3] = args[3].float()
    check_case(load_kernel(w), Case(tuple(args), case.outputs, case.expected, case.cost))


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_views_with_any_token_and_head_strides(dtype):
    """Branches as slices of one tensor, one with heads outside tokens, and gates as a slice."""
    w = workload(dtype, 24)
    case = case_of(w)
    a, b, c, gate, o = case.args
    both = torch.cat([a, b], 1)
    a, b = both[:, : a.shape[1]], both[:, a.shape[1] :]
    c = c.transpose(0, 1).contiguous().transpose(0, 1)
    gate = torch.cat([gate, gate], 2)[..., :3]
    check_case(load_kernel(w), Case((a, b, c, gate, o), case.outputs, case.expected, case.cost))


def test_each_gate_weighs_its_own_branch():
    w = workload()
    a, b, c, gate, o = case_of(w).args
    for i, branch in enumerate((a, b, c)):
        gate.zero_()
        gate[..., i] = 1
        load_kernel(w).launch(a, b, c, gate, o)
        assert torch.equal(o, branch)


def test_no_tokens():
    w = workload()
    load_kernel(w).launch(*case_of(w, 0).args)


def test_a_wrong_call_is_refused():
    w = workload()
    a, b, c, gate, o = case_of(w).args
    launch = load_kernel(w).launch
    with pytest.raises(ValueError, match=r"for three branches and o \[N, HQ, 32\]"):
        launch(a, b[:3], c, gate, o)
    with pytest.raises(ValueError, match="gate must be"):
        launch(a, b, c, gate[..., :2], o)
    with pytest.raises(ValueError, match="last dimension"):
        launch(a, b, c.transpose(0, 2).contiguous().transpose(0, 2), gate, o)
