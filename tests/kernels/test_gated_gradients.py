"""Backward kernels that take the gradient of a gated sum, with each row's gate and delta."""

from typing import Any

import pytest
import torch

from nsagen.codegen.target import KNOWN_TARGETS
from nsagen.codegen.template import spaces_of
from nsagen.harness.base import THRESHOLDS, Sizes, harness_of, relative_error
from nsagen.workload import Schedule, Workload
from tests.support import is_hopper, kernel_device, kernel_dtypes, load_kernel

SM90 = KNOWN_TARGETS["cuda:90"]
STATICS: dict[str, dict[str, Any]] = {
    "compressed_attention": {"kernel_size": 8, "kernel_stride": 4},
    "selected_attention": {"block_size": 64},
    "sliding_window_attention": {"window_size": 40},
}
ALGORITHMS = [(op, space.algorithm) for op in STATICS for space in spaces_of(op, "backward")]


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_gates_of_any_sign(op: str, algorithm: str, dtype: str) -> None:
    """As if do had been multiplied by the gate before, and o were there for delta."""
    shape = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 8}
    workload = Workload.of(op, "backward", dtype=dtype, **shape, **STATICS[op])
    (space,) = (s for s in spaces_of(op, "backward") if s.algorithm == algorithm)
    if not space.general and (not is_hopper() or not space.supports(workload)):
        pytest.skip(f"{algorithm} is for 16-bit dtypes and Hopper")
    case = harness_of(workload).make_case(workload, Sizes((90, 0, 3), 2), kernel_device(), seed=1)
    do, *middle, o, lse, dq, dk, dv, scale = case.args
    assert isinstance(do, torch.Tensor)
    assert isinstance(o, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    gate = torch.randn(lse.shape, device=do.device)
    gate[::7] = 0.0
    delta = (do.float() * o.float()).sum(-1)
    kernel = load_kernel(workload, Schedule.of(algorithm, space.default(workload, SM90)))
    kernel.launch(do, *middle, None, lse, dq, dk, dv, scale, delta, gate)
    do *= gate[..., None]
    for name, expected in case.expected().items():
        assert relative_error(case.outputs[name], expected) <= THRESHOLDS[do.dtype], name
