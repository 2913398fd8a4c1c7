"""The gradients of three branches, summed in the inputs' dtype, where they cancel or overflow.

With u the unit roundoff, a, b, c the gradients by the selected, the sliding and the compressed
branch, and A, B, C the sums of their terms' magnitudes (|a| <= A): a branch rounds its ds and P, at
most u A, u B and u C. The sum rounds a, a + b and a + b + c: another u (|a| + |a + b|) before the
result's own rounding. PyTorch's accumulation rounds |b| and |c| too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.layout import compressed_cu_seqlens

TOKENS, GROUP, DIM, KERNEL, STRIDE, BLOCK = 40, 2, 16, 8, 4, 16
LARGEST = 65520.0
"""What rounds to infinity in float16."""
UNIT = 2.0**-11
GATES = (2.0**-10, 1.0, -1.0 + 2.0**-10)
"""All blocks are selected and the window is as long: two branches cancel but for 1/1024."""

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("cache")]


def inputs(keys: float, gradient: float) -> dict[str, Tensor]:
    """Keys and gradients of the given sizes; scores stay near 1."""
    g = torch.Generator().manual_seed(0)
    windows = (TOKENS - KERNEL) // STRIDE + 1
    rows = {"q": TOKENS, "do": TOKENS, "k": TOKENS, "v": TOKENS, "ck": windows, "cv": windows}
    sizes = {"q": 1 / keys, "do": gradient, "k": keys, "ck": keys}
    return {
        name: sizes.get(name, 1.0)
        * torch.randn(n, GROUP if name in ("q", "do") else 1, DIM, generator=g)
        for name, n in rows.items()
    }


def found(x: dict[str, Tensor], gates: tuple[float, ...]) -> list[Tensor]:
    """dq, dk and dv by the kernels, in float16."""
    x = {name: each.half() for name, each in x.items()}
    gate = torch.tensor(gates).half().expand(TOKENS, GROUP, 3).contiguous()
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v")]
    lengths = torch.tensor([0, TOKENS], dtype=torch.int32)
    statics: dict[str, Any] = {"kernel_size": KERNEL, "kernel_stride": STRIDE}
    statics |= {"block_size": BLOCK, "topk": 3, "init_blocks": 1, "local_blocks": 1}
    o = attend_branches(
        *(x["q"], (x["ck"], x["cv"]), (x["k"], x["v"]), (x["k"], x["v"]), gate),
        cu_seqlens=lengths,
        window_cu_seqlens=compressed_cu_seqlens(lengths, KERNEL, STRIDE),
        branches=BRANCHES,
        window_size=TOKENS,
        softmax_scale=DIM**-0.5,
        **statics,
    )
    assert "branches_forward" in str(o.grad_fn)
    return list(torch.autograd.grad(o, leaves, x["do"]))


def branch(x: dict[str, Tensor], k: Tensor, v: Tensor, seen: Tensor, gate: float) -> Any:
    """Of one branch in float64: its dq, dk and dv, and the sums of their terms' magnitudes.

    A term of ds has the rounding of the branch's output in it, by delta.
    """
    q, do, k, v = (each.double() for each in (x["q"], x["do"], k, v))
    k, v, scale = k[:, 0], v[:, 0], DIM**-0.5
    s = torch.einsum("thd,jd->htj", q, k) * scale
    p = s.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    o = torch.einsum("htj,jd->thd", p, v)
    dp = torch.einsum("thd,jd->htj", do, v)
    ds = scale * gate * p * (dp - (do * o).sum(-1).T[..., None])
    terms = ds.abs() + scale * abs(gate) * p * (do * o).abs().sum(-1).T[..., None]
    p = gate * p
    exact = [torch.einsum("htj,jd->thd", ds, k), torch.einsum("htj,thd->jd", ds, q)[:, None]]
    sums = [
        torch.einsum("htj,jd->thd", terms, k.abs()),
        torch.einsum("htj,thd->jd", terms, q.abs())[:, None],
    ]
    exact.append(torch.einsum("htj,thd->jd", p, do)[:, None])
    sums.append(torch.einsum("htj,thd->jd", p.abs(), do.abs())[:, None])
    return exact, sums


def by_branches(x: dict[str, Tensor], gates: tuple[float, ...]) -> list[Any]:
    """`branch` of the selected, the sliding and the compressed branch, in the sum's order."""
    x = {name: each.half().double() for name, each in x.items()}
    token = torch.arange(TOKENS)[:, None]
    causal = torch.arange(TOKENS) <= token
    ends = torch.arange(x["ck"].shape[0]) * STRIDE + KERNEL - 1
    compressed, selected, sliding = gates
    own = (x["k"], x["v"], causal)
    exact, sums = branch(x, x["ck"], x["cv"], ends <= token, compressed)
    nothing = [torch.zeros_like(x["k"])] * 2  # of the tokens' keys and values
    return [
        branch(x, *own, selected),
        branch(x, *own, sliding),
        ([exact[0], *nothing], [sums[0], *nothing]),
    ]


@pytest.mark.parametrize("gates", [GATES, (1.0, 1.0, 1.0)], ids=["cancel", "add"])
def test_the_sum_adds_no_more_than_two_roundings_of_its_parts(gates: tuple[float, ...]) -> None:
    x = inputs(1.0, 1.0)
    parts = by_branches(x, gates)
    for i, ours in enumerate(found(x, gates)):
        (a, own_a), (b, own_b), (c, own_c) = ((exact[i], sums[i]) for exact, sums in parts)
        if gates == GATES and i < 2:
            assert (a + b).abs().max() * 1000 < a.abs().max()
        right = a + b + c
        summing = a.abs() + (a + b).abs() + right.abs()
        bound = UNIT * (own_a + own_b + own_c + summing)
        assert ((ours.double() - right).abs() <= 1.02 * bound + 2.0**-22).all()


@pytest.mark.parametrize("gradient", [2.0**7, 2.0**11], ids=["inside", "past"])
def test_float16_overflows_where_a_partial_sum_does(gradient: float) -> None:
    """As in PyTorch's accumulation, in this order; never a finite value that is wrong."""
    x = inputs(256.0, gradient)
    assert x["do"].abs().max() * x["v"].abs().max() < LARGEST  # no ds overflows
    parts = by_branches(x, GATES)
    for i, ours in enumerate(found(x, GATES)):
        (a, own_a), (b, own_b), (c, own_c) = ((exact[i], sums[i]) for exact, sums in parts)
        summing = a.abs() + (a + b).abs() + (a + b + c).abs()
        bound = 1.02 * UNIT * (own_a + own_b + own_c + summing) + 2.0**-22
        largest = torch.stack([a.abs(), (a + b).abs(), (a + b + c).abs()]).amax(0)
        finite = ours.isfinite()
        assert finite[largest + bound < LARGEST].all()
        assert not finite[largest - bound > LARGEST].any()
        assert ((ours.double() - (a + b + c)).abs() <= bound)[finite].all()
        assert finite.all() == (gradient == 2.0**7 or i > 0)
