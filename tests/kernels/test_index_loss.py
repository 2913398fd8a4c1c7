"""The index loss's kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.cases.index_loss import make_inputs
from nsagen.core.workload import Schedule, Workload
from nsagen.ops.reference.index_loss import index_loss_forward
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

PASSES = ("forward", "backward")
# Empty, one token, within a block, several blocks.
RAGGED = (0, 1, 9, 37)
SCHEDULES = {
    "forward": Schedule.of("query_major", block_n=16, num_warps=4, num_stages=1),
    "backward": Schedule.of(
        "two_passes", block_n=16, num_warps=4, num_stages=1, key_tile=16, key_warps=4, row_heads=1
    ),
}


def workload_of(pass_: str, dtype: str = "float32", **params: Any) -> Workload:
    shape = {"head_dim": 16, "index_head_dim": 16, "gqa_ratio": 2, "block_size": 16, **params}
    return Workload.of("index_loss", pass_, dtype=dtype, **shape)


def check(workload: Workload, seqlens: tuple[int, ...] = RAGGED, **sizes: Any) -> None:
    given = Sizes(seqlens, **{"kv_heads": 1, **sizes})
    case = cases_of(workload).make_case(workload, given, kernel_device())
    check_case(load_kernel(workload, SCHEDULES[workload.pass_]), case)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_dtypes(pass_: str, dtype: str) -> None:
    check(workload_of(pass_, dtype), (0, 1, 9, 20), kv_heads=2)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "change",
    [
        {"gqa_ratio": 1},
        {"gqa_ratio": 5},
        {"head_dim": 24, "index_head_dim": 40},
        {"block_size": 24},
    ],
    ids=str,
)
def test_shapes(pass_: str, change: dict[str, int]) -> None:
    """Groups and sizes that are no powers of two; blocks of several steps, and parts of one."""
    check(workload_of(pass_, **change), (3, 37))


@pytest.mark.parametrize("pass_", PASSES)
def test_a_selection_is_a_set(pass_: str) -> None:
    """In any order, with repeats and entries that name no block."""
    check(workload_of(pass_), (5, 37), any_order=True)


@pytest.mark.parametrize("scale", [2.0**18, 2.0**-20], ids=["scaled", "mean of many tokens"])
def test_float16_gradients_of_any_weight_of_the_loss(scale: float) -> None:
    """What a loss of float16 is multiplied by is neither past dx's range nor below it."""
    workload = workload_of("backward", "float16")
    case = cases_of(workload).make_case(workload, Sizes((37,), 1), kernel_device())
    plain = {name: x.double() for name, x in case.expected().items()}
    dloss = case.args[6]
    dloss *= scale
    found = {name: torch.empty_like(x, dtype=torch.float32) for name, x in case.outputs.items()}
    load_kernel(workload, SCHEDULES["backward"]).launch(
        *case.args[:9], *found.values(), *case.args[11:]
    )
    for name, x in found.items():
        assert relative_error(x.double() / scale, plain[name]) < THRESHOLDS[torch.float16]


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 6e4])
@pytest.mark.parametrize("keys", ["k", "index_k"])
def test_float32_scores_far_from_zero(keys: str, offset: float) -> None:
    """A bias of keys moves all scores of a row: dx still sums to 0 as well as PyTorch's does."""
    forward = workload_of("forward")
    x = make_inputs(forward, Sizes((37,), 1), kernel_device(), seed=0)
    getattr(x, keys)[..., 0] = -offset
    getattr(x, keys.replace("k", "q"))[..., 0] = 4.0

    def by_torch(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x.index_q, x.index_k)]
        loss, _, _ = index_loss_forward(
            *(x.q.to(dtype), x.k.to(dtype), *leaves, x.topk_idx, x.cu_seqlens),
            **{"block_size": 16, "softmax_scale": x.scales[0], "index_scale": x.scales[1]},
        )
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    loss, lse, lse_index = x.outputs().values()
    load_kernel(forward, SCHEDULES["forward"]).launch(*x.tensors, loss, lse, lse_index, *x.scales)
    found = [torch.empty_like(t) for t in (x.index_q, x.index_k)]
    load_kernel(workload_of("backward"), SCHEDULES["backward"]).launch(
        *x.tensors, torch.ones_like(loss), lse, lse_index, *found, *x.scales
    )
    exact, theirs = by_torch(torch.float64), by_torch(torch.float32)
    for ours, y, wanted in zip((loss, *found), theirs, exact, strict=True):
        assert relative_error(ours, wanted) < 1e-5 + 8 * relative_error(y, wanted)


def test_the_same_input_gives_the_same_bits() -> None:
    workload = workload_of("backward", "float16")
    case = cases_of(workload).make_case(workload, Sizes((37,), 1), kernel_device())
    kernel = load_kernel(workload, SCHEDULES["backward"])
    found = []
    for _ in range(2):
        kernel.launch(*case.args)
        found.append([x.clone() for x in case.outputs.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
