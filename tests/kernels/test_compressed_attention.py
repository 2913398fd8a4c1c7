"""Compressed attention's forward kernel against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Sizes, cu_seqlens_of, relative_error
from nsagen.cases.compressed_attention import make_case, visible_pairs
from nsagen.codegen.template import space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

# Shorter than a window, exactly one, empty, one long sequence and many short ones.
RAGGED = (7, 8, 0, 99, 9, 1, 12)
# Tiles small enough that short sequences take unmasked steps too.
SMALL, BULK = (
    Schedule.of("row_tiles", block_m=32, block_n=16, num_warps=2, num_stages=2, loads=loads)
    for loads in ("pointers", "descriptors")
)


def workload_of(dtype: str = "float16", **params: Any) -> Workload:
    shape = {"head_dim": 32, "gqa_ratio": 2, "kernel_size": 8, "kernel_stride": 4} | params
    shape.setdefault("v_head_dim", shape["head_dim"])
    return Workload.of("compressed_attention", "forward", dtype=dtype, **shape)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("gqa_ratio", [1, 2, 3, 16])
def test_groups(gqa_ratio: int, dtype: str) -> None:
    workload = workload_of(dtype, gqa_ratio=gqa_ratio)
    case = make_case(workload, Sizes((7, 8, 0, 75, 12), 1), kernel_device())
    check_case(load_kernel(workload, SMALL), case)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"),
    [(16, 16), (24, 24), (64, 64), (80, 16), (128, 128), (192, 128)],
)
def test_head_sizes(head_dim: int, v_head_dim: int) -> None:
    workload = workload_of(head_dim=head_dim, v_head_dim=v_head_dim)
    check_case(load_kernel(workload, SMALL), make_case(workload, Sizes(RAGGED), kernel_device()))


@pytest.mark.parametrize(
    ("kernel_size", "kernel_stride"), [(8, 8), (8, 1), (32, 16), (48, 12), (128, 64)]
)
def test_windows(kernel_size: int, kernel_stride: int) -> None:
    workload = workload_of(kernel_size=kernel_size, kernel_stride=kernel_stride)
    lengths = (kernel_size - 1, kernel_size, 0, 150, kernel_size + kernel_stride)
    check_case(load_kernel(workload, SMALL), make_case(workload, Sizes(lengths), kernel_device()))


@pytest.mark.parametrize("head_dim", [24, 32])
def test_descriptors(head_dim: int) -> None:
    workload = workload_of(head_dim=head_dim, gqa_ratio=3)
    check_case(load_kernel(workload, BULK), make_case(workload, Sizes(RAGGED), kernel_device()))


@pytest.mark.parametrize("schedule", [SMALL, BULK], ids=["pointers", "descriptors"])
def test_chunks_of_longer_prompts(schedule: Schedule) -> None:
    """Queries that begin in mid-sequence see the windows that end by their own positions."""
    workload = workload_of()
    whole = make_case(workload, Sizes((90, 0, 12, 61)), kernel_device())
    args: Any = whole.args
    q, k, v, cu_seqlens_q, cu_seqlens_k, o, lse, scale = args
    starts, lengths = (70, 0, 0, 33), (20, 0, 12, 20)
    begins = cu_seqlens_q.tolist()
    rows = [range(b + s, b + s + n) for b, s, n in zip(begins, starts, lengths, strict=False)]
    picked = torch.tensor([row for part in rows for row in part], device=q.device)
    load_kernel(workload, schedule).launch(
        q[picked],
        k,
        v,
        cu_seqlens_of(lengths, q.device),
        cu_seqlens_k,
        o[: len(picked)],
        lse[: len(picked)],
        scale,
        torch.tensor(starts, dtype=torch.int32, device=q.device),
    )
    for name, expected in whole.expected().items():
        out = whole.outputs[name][: len(picked)]
        assert relative_error(out, expected[picked]) <= THRESHOLDS[out.dtype], name


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_default_schedule(dtype: str) -> None:
    workload = workload_of(dtype, head_dim=64, gqa_ratio=16)
    space = space_for(workload, "row_tiles")
    schedule = space.default_schedule(workload, KNOWN_TARGETS["cuda:90"])
    case = make_case(workload, Sizes((20, 200, 3), kv_heads=1), kernel_device())
    check_case(load_kernel(workload, schedule), case)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (7,), (1, 7, 2)])
def test_no_window(lengths: tuple[int, ...]) -> None:
    """Without a visible window: 0 and -inf, whether or not there are any tokens."""
    workload = workload_of()
    case = make_case(workload, Sizes(lengths), kernel_device())
    check_case(load_kernel(workload, BULK), case)
    assert (case.outputs["o"] == 0).all()
    assert (case.outputs["lse"] == float("-inf")).all()


def test_strided_views() -> None:
    """Heads and tokens may lie anywhere, as in slices of one fused projection."""
    workload = workload_of(gqa_ratio=3)
    case = make_case(workload, Sizes((50, 21)), kernel_device())
    q, k, v, *rest = case.args
    assert isinstance(q, torch.Tensor)
    wide = torch.full((q.shape[0], q.shape[1] + 3, 72), float("nan")).to(q)
    wide[:, 2:-1, 8:40] = q
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    load_kernel(workload, SMALL).launch(wide[:, 2:-1, 8:40], *heads_first, *rest)
    outputs = {name: out.clone() for name, out in case.outputs.items()}
    load_kernel(workload, SMALL).launch(*case.args)
    assert all(torch.equal(outputs[name], case.outputs[name]) for name in outputs)


def test_large_scores() -> None:
    """Scores of thousands, of both signs, neither overflow nor lose the row's maximum."""
    workload = workload_of("float32")
    case = make_case(workload, Sizes((90,)), kernel_device())
    case.args[0].mul_(1000.0)  # type: ignore[attr-defined]
    check_case(load_kernel(workload, SMALL), case)


def test_fewer_windows_than_tokens_allow() -> None:
    """cu_seqlens_k decides how many windows there are; what lies behind is another sequence's."""
    workload = workload_of()
    case = make_case(workload, Sizes((60, 60)), kernel_device())
    case.args[4].copy_(torch.tensor([0, 5, 28]))  # type: ignore[attr-defined]
    check_case(load_kernel(workload, SMALL), case)


def test_wrong_arguments() -> None:
    workload = workload_of()
    launch = load_kernel(workload, SMALL).launch
    q, *rest, scale = make_case(workload, Sizes((9,)), kernel_device()).args
    assert isinstance(q, torch.Tensor)
    with pytest.raises(ValueError, match="head_dim 32"):
        launch(q[..., :16], *rest, scale)
    with pytest.raises(ValueError, match="gqa_ratio 2"):
        launch(q[:, :2], *rest, scale)
    with pytest.raises(ValueError, match="contiguous"):
        launch(q.transpose(0, 2).contiguous().transpose(0, 2), *rest, scale)
    with pytest.raises(ValueError, match="positive"):
        launch(q, *rest, 0.0)


@pytest.mark.parametrize("length", [0, 7, 8, 11, 12, 100])
def test_cost_counts_visible_pairs(length: int) -> None:
    pairs = sum(i * 4 + 7 <= t for t in range(length) for i in range(length))
    assert visible_pairs(workload_of(), length) == pairs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("target", KNOWN_TARGETS.values(), ids=str)
def test_defaults_are_valid(target: Any, head_dim: int, dtype: str) -> None:
    workload = workload_of(dtype, head_dim=head_dim)
    space_for(workload).default_schedule(workload, target)
