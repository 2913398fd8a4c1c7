"""Training in CUDA graphs: captured passes, replayed with new inputs, have an eager call's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsagen import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TOKENS, QUERY_HEADS, KV_HEADS, DIM = 2048, 64, 4, 128


def leaves(seed: int) -> list[Tensor]:
    """q, k, v and gates that no backward pass has used."""
    random = torch.Generator("cuda").manual_seed(seed)
    shapes = [(TOKENS, heads, DIM) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]
    made = [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=random)
        for shape in (*shapes, (TOKENS, QUERY_HEADS, 3))
    ]
    return [x.requires_grad_() for x in made]


def results(function, inputs: list[Tensor]) -> list[Tensor]:
    o = function(*inputs)
    gradients = torch.autograd.grad(o.float().pow(2).sum(), inputs)
    return [x.clone() for x in (o.detach(), *gradients)]


def test_make_graphed_callables() -> None:
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")

    def graphed(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return ops.native_sparse_attention(
            q,
            k,
            v,
            gate,
            cu_seqlens=cu_seqlens,
            compress_type="avgpool",
            kernel_size=32,
            kernel_stride=16,
            block_size=64,
            topk=16,
            window_size=512,
        )

    expected = results(graphed, leaves(1))
    captured = torch.cuda.make_graphed_callables(graphed, tuple(leaves(0)))
    for found, wanted in zip(results(captured, leaves(1)), expected, strict=True):
        assert torch.equal(found, wanted)
