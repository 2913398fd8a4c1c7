"""Training in CUDA graphs: replays with new inputs match eager calls bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nsagen import ops
from nsagen.model import ToyNSALlama, ToyNSALlamaConfig
from nsagen.model.packing import Packed

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


def results(function, inputs: list[Tensor], weights: list[Tensor] | None = None) -> list[Tensor]:
    o = function(*inputs)
    gradients = torch.autograd.grad(o.float().pow(2).sum(), [*inputs, *(weights or [])])
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


class Layer(nn.Module):
    """A layer of the toy model on a batch of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        config = ToyNSALlamaConfig(
            **{"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1},
            **{"num_attention_heads": 16, "num_key_value_heads": 1, "vocab_size": 64},
            head_dim=DIM,
        )
        torch.manual_seed(0)
        self.layer = ToyNSALlama(config).cuda().to(torch.bfloat16).model.layers[0]
        cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
        self.packed = Packed.of(cu_seqlens, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.packed)


def test_a_layer_of_the_toy_model() -> None:
    def tokens(seed: int) -> Tensor:
        random = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(TOKENS, 512, dtype=torch.bfloat16, device="cuda", generator=random)
        return x.requires_grad_()

    layer = Layer()
    weights = list(layer.parameters())
    expected = results(layer, [tokens(1)], weights)
    captured = torch.cuda.make_graphed_callables(layer, (tokens(0),))
    for found, wanted in zip(results(captured, [tokens(1)], weights), expected, strict=True):
        assert torch.equal(found, wanted)
