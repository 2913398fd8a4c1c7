"""What training does to ops: autocast around them, and activations that are computed again."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsagen import ops
from nsagen.ops.reference.compress import tensors_of
from nsagen.workload import COMPRESS_TYPES

from .inputs import Packed


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_autocast_narrows_nothing(compress_type: str) -> None:
    """Ops compute in the dtype of their tensors; autocast is for the layers around them."""
    args, keywords = Packed(requires_grad=True).block(compress_type)
    expected = ops.native_sparse_attention(*args, **keywords)
    with torch.autocast("cpu", torch.bfloat16):
        o = ops.native_sparse_attention(*args, **keywords)
    assert torch.equal(o, expected)
    found = torch.autograd.grad(o.sum(), args)
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), args), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_activations_computed_again_give_the_same_gradients(compress_type: str) -> None:
    args, keywords = Packed(requires_grad=True).block(compress_type)
    weights = [keywords["pe"], *tensors_of(keywords["w_k"]), *tensors_of(keywords["w_v"])]

    def block(*args: Tensor) -> Tensor:
        return ops.native_sparse_attention(*args, **keywords)

    expected = torch.autograd.grad(block(*args).sum(), [*args, *weights])
    o = checkpoint(block, *args, use_reentrant=False)
    found = torch.autograd.grad(o.sum(), [*args, *weights])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
