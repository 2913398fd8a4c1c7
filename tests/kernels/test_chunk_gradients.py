"""Backward kernels of chunks of sequences: summed, they give the whole's float64 gradients."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsagen.cases.base import THRESHOLDS, Case, Sizes, cases_of, poisoned, relative_error
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from tests.ops.chunks import cut, cuts
from tests.support import is_hopper, kernel_device, load_kernel

from .test_pipelines_on_cpu import on_cpu

STATICS: dict[str, dict[str, Any]] = {
    "compressed_attention": {"kernel_size": 8, "kernel_stride": 4},
    "selected_attention": {"block_size": 16},
    "sliding_window_attention": {"window_size": 9},
}
BACKWARD = [(op, space.algorithm) for op in STATICS for space in spaces_of(op, "backward")]
PIPELINES = [(op, name) for op, name in BACKWARD if name in ("warp_specialized", "stored_ds")]
PLAIN = [one for one in BACKWARD if one not in PIPELINES]


def kernel(
    op: str, algorithm: str, sizes: tuple[int, int, int], dtype: str = "float32", **changes: int
) -> tuple[Workload, ModuleType]:
    """A workload of a group, head_dim and v_head_dim, and the algorithm's kernels."""
    group, dim, v_dim = sizes
    params = {"head_dim": dim, "v_head_dim": v_dim, "gqa_ratio": group, **STATICS[op], **changes}
    w = Workload.of(op, "backward", dtype=dtype, **params)
    (space,) = (s for s in spaces_of(op, "backward") if s.algorithm == algorithm)
    default: dict[str, Any] = dict(space.default(w, KNOWN_TARGETS["cuda:90"]))
    return w, load_kernel(w, Schedule.of(algorithm, default))


def check_chunks(w: Workload, module: ModuleType, bounds: list[list[int]], gated: bool) -> None:
    """Launch each chunk of a batch, with poisoned outputs, and compare the sums with the whole."""
    lengths = tuple(sequence[-1] for sequence in bounds)
    case: Case = cases_of(w).make_case(w, Sizes(lengths, 2), kernel_device(), seed=1)
    names = inspect.signature(module.launch).parameters
    whole: dict[str, Any] = dict(zip(names, case.args, strict=False))
    gate = torch.randn(whole["lse"].shape, device=kernel_device()) if gated else None
    sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in case.outputs.items()}
    for chunk in cut(bounds):
        part = dict(whole)
        for name in ("do", "q", "o", "lse"):
            part[name] = whole[name][chunk.rows]
        if "topk_idx" in part:
            part["topk_idx"] = whole["topk_idx"][:, chunk.rows].contiguous()
        for name in ("dq", "dk", "dv"):
            shape = part["q"].shape if name == "dq" else whole[name].shape
            part[name] = poisoned(tuple(shape), whole[name].dtype, kernel_device())
        of_queries = "cu_seqlens_q" if "cu_seqlens_q" in part else "cu_seqlens"
        part[of_queries] = chunk.cu_seqlens.to(kernel_device())
        if "cu_seqlens_k" not in part:
            part["cu_seqlens_k"] = whole["cu_seqlens"]
        if gate is not None:
            part["delta"] = (part["do"].float() * part["o"].float()).sum(-1)
            part |= {"o": None, "gate": gate[chunk.rows]}
        module.launch(**part, q_start=chunk.q_start.to(kernel_device()))
        sums["dq"][chunk.rows] = part["dq"].double()
        sums["dk"] += part["dk"]
        sums["dv"] += part["dv"]
    if gate is not None:
        whole["do"] *= gate[..., None]
    for name, expected in case.expected().items():
        assert relative_error(sums[name], expected) <= THRESHOLDS[whole["q"].dtype], name


@pytest.mark.parametrize(("op", "algorithm"), PLAIN)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    cuts(longest=20),
    st.sampled_from([(1, 16, 16), (2, 16, 24), (3, 24, 16), (4, 32, 32), (6, 16, 16)]),
    st.booleans(),
)
def test_any_cut(
    op: str, algorithm: str, bounds: list[list[int]], sizes: tuple[int, int, int], gated: bool
) -> None:
    check_chunks(*kernel(op, algorithm, sizes), bounds, gated)


@pytest.mark.parametrize(("op", "algorithm"), PIPELINES)
def test_pipelines(op: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"block_size": 64} if op == "selected_attention" else {}
    w, module = kernel(op, algorithm, (8, 64, 64), "float16", **more)
    if kernel_device() == "cpu":
        on_cpu(monkeypatch, module)
    elif not is_hopper():
        pytest.skip("the pipelines are for Hopper")
    check_chunks(w, module, [[0, 40, 66], [0, 0, 3], [0, 0, 0]], gated=True)
