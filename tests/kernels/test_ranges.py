"""Scores far from zero, and large gradients of float16: nothing is lost that PyTorch would keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nsagen.cases.base import cu_seqlens_of
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Workload
from tests.support import kernel_device, load_kernel

TOKENS, GROUP, DIM, BLOCK = 36, 2, 16, 16
STATICS: dict[str, dict[str, Any]] = {
    "compressed_attention": {"kernel_size": 8, "kernel_stride": 4},
    "selected_attention": {"block_size": BLOCK},
    "sliding_window_attention": {"window_size": 12},
}
SELECTED = torch.tensor([[0, 1, 2]]).expand(TOKENS, 3)
"""All blocks of a token up to its own."""


@pytest.fixture(autouse=True)
def _products_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ds sums to 0 where both passes round a score alike, as kernels do on a GPU.

    NumPy adds up in an order that depends on the CPU and on a product's shape: here in float64.
    """
    if kernel_device() == "cpu":
        from triton.runtime import interpreter

        def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
            product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def kernel(op: str, pass_: str, algorithm: str, dtype: str, **sizes: int) -> Any:
    sizes = {"head_dim": DIM, "v_head_dim": DIM, "gqa_ratio": GROUP, **sizes}
    w = Workload.of(op, pass_, dtype=dtype, **sizes, **STATICS[op])
    (space,) = (s for s in spaces_of(op, pass_) if s.algorithm == algorithm)
    return load_kernel(w, space.default_schedule(w, KNOWN_TARGETS["cuda:90"]))


def general(op: str, pass_: str) -> list[str]:
    return [space.algorithm for space in spaces_of(op, pass_) if space.general]


PAIRS = [
    (op, a, b) for op in STATICS for a in general(op, "forward") for b in general(op, "backward")
]


def offsets_of(op: str, keys: int) -> tuple[Tensor, ...]:
    """What follows q, k and v in an op's `launch`."""
    cu_seqlens = cu_seqlens_of((TOKENS,), kernel_device())
    if op == "compressed_attention":
        return cu_seqlens, cu_seqlens_of((keys,), kernel_device())
    if op == "selected_attention":
        return SELECTED[None].to(kernel_device(), torch.int32).contiguous(), cu_seqlens
    return (cu_seqlens,)


def visible(op: str, keys: int) -> Tensor:
    t, u = torch.arange(TOKENS)[:, None], torch.arange(keys)[None]
    if op == "compressed_attention":
        return u * 4 + 8 - 1 <= t
    return (u <= t) & (u > t - 12) if op == "sliding_window_attention" else u <= t


def by_kernels(op: str, forward: str, backward: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor):
    """o, dq, dk and dv on the CPU."""
    dtype = str(q.dtype).removeprefix("torch.")
    q, k, v, do = (x.to(kernel_device()) for x in (q, k, v, do))
    o, lse = torch.empty_like(do), torch.empty(q.shape[:2], device=q.device)
    offsets, scale = offsets_of(op, len(k)), q.shape[2] ** -0.5
    sizes = {"head_dim": q.shape[2], "v_head_dim": v.shape[2], "gqa_ratio": q.shape[1]}
    kernel(op, "forward", forward, dtype, **sizes).launch(q, k, v, *offsets, o, lse, scale)
    found = [torch.empty_like(x) for x in (q, k, v)]
    launch = kernel(op, "backward", backward, dtype, **sizes).launch
    launch(do, q, k, v, *offsets, o, lse, *found, scale)
    return [x.cpu() for x in (o, *found)]


def by_torch(op: str, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The same, with a dense mask and PyTorch's softmax."""
    q, k, v, do = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = visible(op, len(k))
    scores = torch.einsum("tgd,ud->tgu", q, k[:, 0]) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    p = torch.zeros_like(scores)
    rows = mask.any(1)
    p[rows] = scores[rows].softmax(-1)
    o = torch.einsum("tgu,ud->tgd", p, v[:, 0])
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 6e4])
@pytest.mark.parametrize(("op", "forward", "backward"), PAIRS)
def test_float32_scores_far_from_zero(op: str, forward: str, backward: str, offset: float) -> None:
    """A bias of the keys moves all scores of a row: ds still sums to 0 as well as PyTorch's."""
    torch.manual_seed(1)
    keys = (TOKENS - 8) // 4 + 1 if op == "compressed_attention" else TOKENS
    q, do = torch.randn(2, TOKENS, GROUP, DIM)
    k, v = torch.randn(2, keys, 1, DIM)
    q[..., 0], k[..., 0] = 4.0, -offset
    tensors = (q, k, v, do)
    exact = by_torch(op, torch.float64, *tensors)
    theirs = by_torch(op, torch.float32, *tensors)
    ours = by_kernels(op, forward, backward, *tensors)
    for name, x, y, wanted in zip(("o", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert error(x, wanted) < 1e-5 + 8 * error(y, wanted), name


def test_wide_float32_heads_scale_last_in_both_passes() -> None:
    """Heads above 128 keep peaks before the scale, in parts of a softmax too."""
    torch.manual_seed(1)
    q, do = torch.randn(2, TOKENS, GROUP, 136)
    k, v = torch.randn(2, TOKENS, 1, 136)
    q[..., 0], k[..., 0] = 4.0, -6e4
    exact = by_torch("selected_attention", torch.float64, q, k, v, do)
    theirs = by_torch("selected_attention", torch.float32, q, k, v, do)
    ours = by_kernels("selected_attention", "key_major", "key_major", q, k, v, do)
    for name, x, y, wanted in zip(("o", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert error(x, wanted) < 1e-5 + 8 * error(y, wanted), name


@pytest.mark.parametrize(("query", "offset"), [(0.5, 60.0), (4.0, 6e4)], ids=["-7.5", "-6e4"])
@pytest.mark.parametrize(("op", "forward", "backward"), PAIRS)
def test_float16_gradients_of_a_scaled_loss(
    op: str, forward: str, backward: str, query: float, offset: float
) -> None:
    """A loss scale of 2**15: shares of dq are far above 65504 and cancel.

    Beside scores of -6e4 what is left of dq in the offset's place is the rounding of ds, which
    float16 products have: finite, but 6e4 times as large. PyTorch in float16 gives NaN there.
    """
    torch.manual_seed(1)
    keys = (TOKENS - 8) // 4 + 1 if op == "compressed_attention" else TOKENS
    q, do = torch.randn(2, TOKENS, GROUP, DIM)
    k, v = torch.randn(2, keys, 1, DIM)
    q[..., 0], k[..., 0] = query, -offset
    do *= 2.0**15 / 64
    tensors = tuple(x.half() for x in (q, k, v, do))
    exact = by_torch(op, torch.float64, *tensors)
    assert exact[1].abs().max() < 2e4
    o, dq, dk, dv = by_kernels(op, forward, backward, *tensors)
    for x, wanted in zip((o, dq, dk, dv), exact, strict=True):
        assert x.isfinite().all()
        ignored = int(x is dq and offset == 6e4)
        assert error(x[..., ignored:], wanted[..., ignored:]) < 1e-2


def check_large_ds(op: str, forward: str, backward: str) -> None:
    """ds of float16 that is past its range, though no gradient is: few rows have large do."""
    torch.manual_seed(2)
    keys = (TOKENS - 8) // 4 + 1 if op == "compressed_attention" else TOKENS
    q, do = torch.randn(2, TOKENS, 8, 64)
    k, v = torch.randn(2, keys, 1, 64)
    do *= 2.0**15 / 64
    do[11::12, 0] *= 64
    tensors = tuple(x.half() for x in (q, k, v, do.clamp(-6e4, 6e4)))
    q, k, v, do = (x.double() for x in tensors)
    scores = torch.einsum("tgd,ud->tgu", q, k[:, 0]) / 8
    p = scores.masked_fill(~visible(op, keys)[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    dp = torch.einsum("tgd,ud->tgu", do, v[:, 0])
    assert (p * (dp - (p * dp).sum(-1, keepdim=True))).abs().max() > 1.9 * 65504
    exact = by_torch(op, torch.float64, *tensors)
    assert all(x.abs().max() < 65504 for x in exact)
    for x, wanted in zip(by_kernels(op, forward, backward, *tensors), exact, strict=True):
        assert error(x, wanted) < 2e-3


@pytest.mark.parametrize(("op", "forward", "backward"), PAIRS)
def test_float16_ds_of_a_loss_scaled_by_2_to_the_15(op: str, forward: str, backward: str) -> None:
    check_large_ds(op, forward, backward)
