"""Selected attention of as many blocks as MiniCPM4 selects, and of blocks as long as MoBA's.

The last queries of a sequence, so that the interpreter has little to do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.cases.base import THRESHOLDS, poisoned, relative_error
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.support import kernel_device, load_kernel

QUERIES, KV_HEADS, GROUP, DIM = 3, 1, 2, 16
WIDE = {
    "96 blocks": (4, 96, 4 * 101 + 3),  # block_size, topk, tokens
    "blocks of 4096": (4096, 2, 2 * 4096 + 100),
}
PLAIN = [
    (pass_, space.algorithm)
    for pass_ in ("forward", "backward")
    for space in spaces_of("selected_attention", pass_)
    if space.triton is None  # Gluon's run on GPUs alone
]


def inputs(block_size: int, topk: int, tokens: int) -> dict[str, Any]:
    """Random tensors by the names of `launch`; each query selects its own block and random ones."""
    generator = torch.Generator().manual_seed(topk)

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, DIM, generator=generator).to(kernel_device())

    blocks = -(-tokens // block_size)
    rank = torch.rand(KV_HEADS, QUERIES, blocks, generator=generator)
    rank[..., -1] = 2.0
    chosen = rank.topk(min(topk, blocks)).indices.sort(-1).values.to(torch.int32)
    topk_idx = torch.full((KV_HEADS, QUERIES, topk), -1, dtype=torch.int32)
    topk_idx[..., : chosen.shape[-1]] = chosen

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=kernel_device())

    return {
        "q": normal(QUERIES, KV_HEADS * GROUP),
        "k": normal(tokens, KV_HEADS),
        "v": normal(tokens, KV_HEADS),
        "topk_idx": topk_idx.to(kernel_device()),
        **{"cu_seqlens": ints(0, QUERIES), "cu_seqlens_k": ints(0, tokens)},
        "q_start": ints(tokens - QUERIES),
    }


def right(x: dict[str, Any], block_size: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """In float64: o, lse, the gradients of q, k and v, and the gradient of o that they are for."""
    leaves = [x[name].double().requires_grad_() for name in ("q", "k", "v")]
    more = {name: x[name] for name in ("cu_seqlens_k", "q_start")}
    o, lse = reference.selected_attention(
        *leaves, x["topk_idx"], x["cu_seqlens"], block_size=block_size, **more
    )
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    return o.detach(), lse.detach(), list(torch.autograd.grad(o, leaves, do)), do


@pytest.mark.parametrize(("pass_", "algorithm"), PLAIN)
@pytest.mark.parametrize("wide", WIDE)
def test_many_and_long_blocks(wide: str, pass_: str, algorithm: str) -> None:
    block_size, topk, tokens = WIDE[wide]
    params = {"head_dim": DIM, "v_head_dim": DIM, "gqa_ratio": GROUP, "block_size": block_size}
    work = Workload.of("selected_attention", pass_, dtype="float32", **params)
    target = KNOWN_TARGETS["cuda:90"]
    (space,) = (s for s in spaces_of("selected_attention", pass_) if s.algorithm == algorithm)
    if not (space.supports(work) and space.runs_on(target)):
        pytest.skip("an algorithm for other shapes")
    schedule = Schedule.of(algorithm, dict(space.default(work, target)))
    if space.violations(work, schedule, target):
        pytest.skip("keeps whole blocks in shared memory")
    module = load_kernel(work, schedule)
    x = inputs(block_size, topk, tokens)
    o, lse, gradients, do = right(x, block_size)
    if pass_ == "forward":
        expected = {"o": o, "lse": lse}
    else:
        expected = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        x |= {"do": do.float(), "o": o.float(), "lse": lse.float()}
    found = {n: poisoned(y.shape, torch.float32, kernel_device()) for n, y in expected.items()}
    module.launch(**x, **found, softmax_scale=DIM**-0.5)
    for name, y in expected.items():
        assert relative_error(found[name], y) <= THRESHOLDS[torch.float32], name
