"""Logits in float32: as exact as the product's accumulators, or the layer's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.model.layers import linear
from nsagen.model.logits import _Logits, logits_of


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator).to(device, dtype)
    return x, linear(64, 1000, 1.0, generator).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_a_cpu_they_are_the_layers_own(dtype: torch.dtype) -> None:
    x, head = inputs("cpu", dtype)
    logits = logits_of(x, head)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(x).float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_they_are_not_rounded_and_have_the_layers_gradients(dtype: torch.dtype) -> None:
    x, head = inputs("cuda", dtype)
    x.requires_grad_()
    expected = x.double() @ head.weight.double().t()
    found = logits_of(x, head)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < THRESHOLDS[torch.float32]
    assert relative_error(head(x).float(), expected) > THRESHOLDS[torch.float32]

    gradient = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, (x, head.weight), gradient.double())
    gradients = torch.autograd.grad(found, (x, head.weight), gradient)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < THRESHOLDS[dtype]


@pytest.mark.gpu
def test_whoever_hooks_into_the_layer_is_called() -> None:
    x, head = inputs("cuda", torch.bfloat16)
    head.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(logits_of(x, head), head(x).float())


def test_transforms_of_torch_func_see_through_the_product_in_float32() -> None:
    """The product exists on GPUs and the meta device, which shows shapes and dtypes."""
    x = torch.empty(3, 8, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(5, 8, dtype=torch.bfloat16, device="meta")
    gradients = torch.func.grad(lambda *args: _Logits.apply(*args).sum(), argnums=(0, 1))(x, weight)
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in (x, weight)]
