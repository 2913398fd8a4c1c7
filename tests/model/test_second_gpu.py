"""Tensors of a GPU that is not the current one: every pass runs there, with the same results."""

from __future__ import annotations

import pytest
import torch

from nsagen.model import InferenceConfig
from tests.model.tiny import nsa_model, packed_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LENGTHS = [1, 9, 64, 100, 200]


def gradients(device: str) -> list[torch.Tensor]:
    model = nsa_model(dtype=torch.float16).to(device)
    ids, cu_seqlens = (tensor.to(device) for tensor in packed_batch(LENGTHS))
    model(ids, cu_seqlens).square().mean().backward()
    return [p.grad.cpu() for p in model.parameters() if p.grad is not None]


def test_training() -> None:
    assert torch.cuda.current_device() == 0
    for here, there in zip(gradients("cuda:0"), gradients("cuda:1"), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("paged", [False, True])
def test_generation(paged: bool) -> None:
    limits = InferenceConfig(5, 256, 24, paged=paged, page_size=64)
    model = nsa_model(limits, torch.float16)
    ids, cu_seqlens = packed_batch(LENGTHS)
    tokens = [
        model.to(device).generate(ids.to(device), cu_seqlens.to(device)).cpu()
        for device in ("cuda:0", "cuda:1")
    ]
    assert torch.cuda.current_device() == 0
    assert torch.equal(*tokens)
