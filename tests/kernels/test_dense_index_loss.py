"""The dense index loss's kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.cases.index_loss import make_inputs
from nsagen.core.workload import Schedule, Workload
from nsagen.ops.reference.index_loss import dense_index_loss_forward
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

PASSES = ("forward", "backward")
# Empty, one token, within a tile, several tiles.
RAGGED = (0, 1, 9, 37)


def schedule_of(pass_: str, block_m: int = 16, block_n: int = 16) -> Schedule:
    tile = {"block_m": block_m, "block_n": block_n, "num_warps": 4, "num_stages": 1}
    if pass_ == "backward":
        return Schedule.of("keys", tile)
    return Schedule.of("tiles", tile, lse_tokens=32)


def workload_of(pass_: str, dtype: str = "float32", **params: Any) -> Workload:
    shape = {"head_dim": 16, "index_head_dim": 16, "gqa_ratio": 2, **params}
    return Workload.of("dense_index_loss", pass_, dtype=dtype, **shape)


def check(
    workload: Workload, seqlens: tuple[int, ...], schedule: Schedule, kv_heads: int = 1
) -> None:
    case = cases_of(workload).make_case(workload, Sizes(seqlens, kv_heads), kernel_device())
    check_case(load_kernel(workload, schedule), case)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_dtypes(pass_: str, dtype: str) -> None:
    check(workload_of(pass_, dtype), RAGGED, schedule_of(pass_), kv_heads=2)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("tile", [(32, 16), (16, 32)], ids=["more tokens", "more keys"])
def test_tiles_that_are_not_square(pass_: str, tile: tuple[int, int]) -> None:
    """A tile of keys begins within a tile of tokens, and the other way round."""
    check(workload_of(pass_), (0, 1, 17, 70), schedule_of(pass_, *tile))


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "change",
    [{"gqa_ratio": 1}, {"gqa_ratio": 5}, {"head_dim": 24, "index_head_dim": 40}],
    ids=str,
)
def test_shapes(pass_: str, change: dict[str, int]) -> None:
    """Groups and sizes that are no powers of two."""
    check(workload_of(pass_, **change), (3, 37), schedule_of(pass_))


@pytest.mark.parametrize("scale", [2.0**18, 2.0**-20], ids=["scaled", "mean of many tokens"])
def test_float16_gradients_of_any_weight_of_the_loss(scale: float) -> None:
    """What a loss of float16 is multiplied by is neither past dx's range nor below it."""
    workload = workload_of("backward", "float16")
    case = cases_of(workload).make_case(workload, Sizes((37,), 1), kernel_device())
    plain = {name: x.double() for name, x in case.expected().items()}
    dloss = case.args[5]
    dloss *= scale
    found = {name: torch.empty_like(x, dtype=torch.float32) for name, x in case.outputs.items()}
    args = (*case.args[:9], *found.values(), *case.args[11:])
    load_kernel(workload, schedule_of("backward")).launch(*args)
    for name, x in found.items():
        assert relative_error(x.double() / scale, plain[name]) < THRESHOLDS[torch.float16]


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 6e4])
@pytest.mark.parametrize("keys", ["k", "index_k"])
def test_float32_scores_far_from_zero(keys: str, offset: float) -> None:
    """A bias of keys moves all scores of a row: s - p still sums to 0 as well as PyTorch's does."""
    forward = workload_of("forward")
    x = make_inputs(forward, Sizes((37,), 1), kernel_device(), seed=0)
    getattr(x, keys)[..., 0] = -offset
    getattr(x, keys.replace("k", "q"))[..., 0] = 4.0
    scales = dict(zip(("softmax_scale", "index_scale"), x.scales, strict=True))

    def by_torch(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x.index_q, x.index_k)]
        tensors = (x.q.to(dtype), x.k.to(dtype), *leaves, x.cu_seqlens)
        loss = dense_index_loss_forward(*tensors, **scales)[0]
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    loss, *kept = x.outputs().values()
    kernel = load_kernel(forward, schedule_of("forward"))
    kernel.launch(*x.tensors, loss, *kept, *x.scales)
    found = [torch.empty_like(t) for t in (x.index_q, x.index_k)]
    load_kernel(workload_of("backward"), schedule_of("backward")).launch(
        *x.tensors, torch.ones_like(loss), *kept, *found, *x.scales
    )
    exact, theirs = by_torch(torch.float64), by_torch(torch.float32)
    for ours, y, wanted in zip((loss, *found), theirs, exact, strict=True):
        assert relative_error(ours, wanted) < 1e-5 + 8 * relative_error(y, wanted)


@pytest.mark.parametrize("pass_", PASSES)
def test_the_same_input_gives_the_same_bits(pass_: str) -> None:
    workload = workload_of(pass_, "float16")
    case = cases_of(workload).make_case(workload, Sizes((37,), 2), kernel_device())
    kernel = load_kernel(workload, schedule_of(pass_))
    found = []
    for _ in range(2):
        kernel.launch(*case.args)
        found.append([x.clone() for x in case.outputs.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_long_sequences(pass_: str, tokens: int) -> None:
    """M3's layer with one key/value head, by the default schedule."""
    sizes = {"head_dim": 128, "index_head_dim": 128, "gqa_ratio": 16}
    workload = workload_of(pass_, "bfloat16", **sizes)
    case = cases_of(workload).make_case(workload, Sizes((tokens - 5, 5), 1), "cuda")
    check_case(load_kernel(workload), case)
