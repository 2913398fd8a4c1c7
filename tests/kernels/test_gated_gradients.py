"""Backward kernels that take the gradient of a gated sum, with each row's gate and delta."""

from types import ModuleType
from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Param, Schedule, Workload
from tests.support import is_hopper, kernel_device, kernel_dtypes, load_kernel

SM90 = KNOWN_TARGETS["cuda:90"]
STATICS: dict[str, dict[str, Any]] = {
    "compressed_attention": {"kernel_size": 8, "kernel_stride": 4},
    "selected_attention": {"block_size": 64},
    "sliding_window_attention": {"window_size": 40},
}
ALGORITHMS = [(op, space.algorithm) for op in STATICS for space in spaces_of(op, "backward")]


ADDED = {
    "compressed_attention": ("dq",),
    "sliding_window_attention": ("dq", "dk", "dv"),
}
"""What a backward kernel can add to; no other branch has compressed keys."""


def variant(
    op: str, algorithm: str, dtype: str, dim: int = 64, **knobs: Param
) -> tuple[Workload, ModuleType]:
    """A workload and its kernel; skips what this process cannot run."""
    shape = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": 8}
    workload = Workload.of(op, "backward", dtype=dtype, **shape, **STATICS[op])
    (space,) = (s for s in spaces_of(op, "backward") if s.algorithm == algorithm)
    if not space.general and (not is_hopper() or not space.supports(workload)):
        pytest.skip(f"{algorithm} is for 16-bit dtypes and Hopper, and some head sizes")
    schedule = Schedule.of(algorithm, space.default(workload, SM90), **knobs)
    return workload, load_kernel(workload, schedule)


def check_gates(workload: Workload, kernel: ModuleType) -> None:
    """Compare the gradients of rows with gates of any sign with the reference's."""
    case = cases_of(workload).make_case(workload, Sizes((90, 0, 3), 2), kernel_device(), seed=1)
    do, *middle, o, lse, dq, dk, dv, scale = case.args
    assert isinstance(do, torch.Tensor)
    assert isinstance(o, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    gate = torch.randn(lse.shape, device=do.device)
    gate[::7] = 0.0
    delta = (do.float() * o.float()).sum(-1)
    kernel.launch(do, *middle, None, lse, dq, dk, dv, scale, delta, gate)
    do *= gate[..., None]
    for name, expected in case.expected().items():
        assert relative_error(case.outputs[name], expected) <= THRESHOLDS[do.dtype], name


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_gates_of_any_sign(op: str, algorithm: str, dtype: str) -> None:
    """As if do had been multiplied by the gate before, and o were there for delta."""
    check_gates(*variant(op, algorithm, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ADDED)
def test_gates_of_any_sign_where_scores_are_hidden(op: str, dtype: str) -> None:
    check_gates(*variant(op, "warp_specialized", dtype, hide="scores"))


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("op", "algorithm"), [x for x in ALGORITHMS if x[0] in ADDED])
def test_gradients_are_added(op: str, algorithm: str, dtype: str, dim: int) -> None:
    """To what the outputs hold, with the same bits each time; the other outputs are written."""
    workload, kernel = variant(op, algorithm, dtype, dim)
    sizes = Sizes((50, 0, 3), 1)
    case = cases_of(workload).make_case(workload, sizes, kernel_device(), seed=1)
    before = {name: torch.randn_like(case.outputs[name]) for name in ADDED[op]}
    found = []
    for _ in range(2):
        for name, x in case.outputs.items():
            x.copy_(before[name]) if name in before else x.fill_(float("nan"))
        kernel.launch(*case.args, add=True)
        found.append({name: x.clone() for name, x in case.outputs.items()})
    for name, expected in case.expected().items():
        right = expected + before[name].double() if name in before else expected
        assert relative_error(found[0][name], right) <= THRESHOLDS[before["dq"].dtype], name
        assert all(torch.equal(found[0][name], again[name]) for again in found[1:]), name


@pytest.mark.parametrize("algorithm", [a for op, a in ALGORITHMS if op == "compressed_attention"])
def test_no_window_adds_nothing(algorithm: str) -> None:
    """Sequences shorter than a window: dq stays as it was."""
    workload, kernel = variant("compressed_attention", algorithm, "float16")
    case = cases_of(workload).make_case(workload, Sizes((3, 0, 7), 2), kernel_device(), seed=1)
    before = torch.randn_like(case.outputs["dq"])
    case.outputs["dq"].copy_(before)
    kernel.launch(*case.args, add=True)
    assert torch.equal(case.outputs["dq"], before)
    assert not case.outputs["dk"].any()
    assert not case.outputs["dv"].any()
