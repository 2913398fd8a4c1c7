"""Compressed attention's backward kernels against the gradients of the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.compressed_attention_backward import make_case
from nsagen.codegen.template import space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

# Shorter than a window, exactly one, empty, one long sequence and many short ones.
RAGGED = (7, 8, 0, 75, 9, 1, 12)


def workload_of(dtype: str = "float16", **params: Any) -> Workload:
    shape = {"head_dim": 32, "gqa_ratio": 2, "kernel_size": 8, "kernel_stride": 4} | params
    shape.setdefault("v_head_dim", shape["head_dim"])
    return Workload.of("compressed_attention", "backward", dtype=dtype, **shape)


def case_of(workload: Workload, lengths: tuple[int, ...] = RAGGED, kv_heads: int = 2) -> Case:
    return make_case(workload, Sizes(lengths, kv_heads), kernel_device(), seed=1)


def small(workload: Workload, **knobs: Any) -> Schedule:
    """Tiles small enough that short sequences have several chunks and unmasked steps too."""
    default = space_for(workload).default(workload, KNOWN_TARGETS["cuda:90"])
    sides = {"block_m": 32, "block_n": 16, "key_tile": 16, "row_step": 16}
    return Schedule.of("two_passes", {**default, **sides, **knobs})


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("gqa_ratio", [1, 2, 3, 4, 6, 16])
def test_groups(gqa_ratio: int, dtype: str) -> None:
    workload = workload_of(dtype, gqa_ratio=gqa_ratio)
    case = case_of(workload, (7, 8, 0, 45, 12), kv_heads=1)
    check_case(load_kernel(workload, small(workload)), case)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"), [(24, 24), (64, 64), (80, 16), (128, 128), (192, 128)]
)
def test_head_sizes(head_dim: int, v_head_dim: int) -> None:
    workload = workload_of(head_dim=head_dim, v_head_dim=v_head_dim)
    check_case(load_kernel(workload, small(workload)), case_of(workload, kv_heads=1))


@pytest.mark.parametrize(
    ("kernel_size", "kernel_stride"), [(8, 8), (8, 1), (32, 16), (48, 12), (128, 64)]
)
def test_windows(kernel_size: int, kernel_stride: int) -> None:
    workload = workload_of(kernel_size=kernel_size, kernel_stride=kernel_stride)
    lengths = (kernel_size - 1, kernel_size, 0, 90 + kernel_size, kernel_size + kernel_stride)
    check_case(load_kernel(workload, small(workload)), case_of(workload, lengths, kv_heads=1))


@pytest.mark.parametrize("gqa_ratio", [1, 3])
@pytest.mark.parametrize(
    ("key_tile", "row_step", "block_m", "block_n"),
    [(16, 64, 64, 16), (64, 16, 16, 64), (128, 32, 128, 32)],
)
def test_schedules(
    gqa_ratio: int, key_tile: int, row_step: int, block_m: int, block_n: int
) -> None:
    workload = workload_of(gqa_ratio=gqa_ratio)
    sides = {"key_tile": key_tile, "row_step": row_step, "block_m": block_m, "block_n": block_n}
    case = case_of(workload, (150, 30), kv_heads=1)
    check_case(load_kernel(workload, small(workload, **sides)), case)


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_default_schedule(dtype: str) -> None:
    workload = workload_of(dtype, head_dim=64, gqa_ratio=16)
    check_case(load_kernel(workload), case_of(workload, (20, 90, 3), kv_heads=1))


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (7,), (1, 7, 2)])
def test_no_window(lengths: tuple[int, ...]) -> None:
    """Rows that see no window have lse -inf and zero gradients; spare rows of k and v hold NaN."""
    workload = workload_of()
    case = case_of(workload, lengths)
    load_kernel(workload, small(workload)).launch(*case.args)
    assert all((out == 0).all() for out in case.outputs.values())


def test_spare_rows_get_zero_and_leak_nothing() -> None:
    workload = workload_of()
    case = case_of(workload)
    _, _, k, v, *_ = case.args
    assert isinstance(k, torch.Tensor)
    assert isinstance(v, torch.Tensor)
    spare = k.isnan().any(2).any(1)
    assert spare.any()
    check_case(load_kernel(workload, small(workload)), case)
    assert not case.outputs["dk"][spare].any()
    assert not case.outputs["dv"][spare].any()


def test_strided_views() -> None:
    """Heads and tokens may lie anywhere, as in slices of one fused projection."""
    workload = workload_of(gqa_ratio=3)
    case = case_of(workload, (50, 21))
    kernel = load_kernel(workload, small(workload))
    kernel.launch(*case.args)
    outputs = {name: out.clone() for name, out in case.outputs.items()}
    do, q, k, v, *rest = case.args
    assert isinstance(q, torch.Tensor)
    wide = torch.full((2, q.shape[0], q.shape[1] + 3, 72), float("nan")).to(q)
    wide[0, :, 2:-1, 8:40], wide[1, :, 2:-1, 8:40] = q, do
    q, do = wide[:, :, 2:-1, 8:40]
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]  # type: ignore[attr-defined]
    kernel.launch(do, q, *heads_first, *rest)
    assert all(torch.equal(outputs[name], case.outputs[name]) for name in outputs)


def test_sequences_do_not_read_each_other() -> None:
    """NaN in the other sequences reaches none of this one's gradients."""
    workload = workload_of("float32")
    case = case_of(workload, (20, 41, 30))
    expected = case.expected()
    do, q, k, v, cu_seqlens_q, cu_seqlens_k, *_ = case.args
    for offsets, tensors in ((cu_seqlens_q, (do, q)), (cu_seqlens_k, (k, v))):
        begin, end = offsets[1:3].tolist()  # type: ignore[index]
        for x in tensors:
            x[:begin] = float("nan")  # type: ignore[index]
            x[end:] = float("nan")  # type: ignore[index]
    load_kernel(workload, small(workload)).launch(*case.args)
    for name, offsets in (("dq", cu_seqlens_q), ("dk", cu_seqlens_k), ("dv", cu_seqlens_k)):
        ours = slice(*offsets[1:3].tolist())  # type: ignore[index]
        came, right = case.outputs[name][ours].double(), expected[name][ours]
        torch.testing.assert_close(came, right, atol=1e-5, rtol=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    workload = workload_of()
    case = case_of(workload, (90,), kv_heads=1)
    kernel = load_kernel(workload, small(workload))
    kernel.launch(*case.args)
    first = {name: out.clone() for name, out in case.outputs.items()}
    kernel.launch(*case.args)
    assert all(torch.equal(first[name], out) for name, out in case.outputs.items())


def test_wrong_arguments() -> None:
    workload = workload_of()
    launch = load_kernel(workload, small(workload)).launch
    do, q, *rest = case_of(workload, (9,)).args
    assert isinstance(q, torch.Tensor)
    with pytest.raises(ValueError, match="head_dim 32"):
        launch(do, q[..., :16], *rest)
    turned = q.transpose(0, 2).contiguous().transpose(0, 2)
    with pytest.raises(ValueError, match="last dimension"):
        launch(do, turned, *rest)
    k, v, cu_q, cu_k, o, lse, _, *more = rest
    with pytest.raises(ValueError, match="dq, dk and dv must be contiguous"):
        launch(do, q, k, v, cu_q, cu_k, o, lse, turned, *more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("target", KNOWN_TARGETS.values(), ids=str)
def test_defaults_are_valid(target: Any, head_dim: int, dtype: str) -> None:
    workload = workload_of(dtype, head_dim=head_dim)
    space_for(workload).default_schedule(workload, target)
