"""Ops under autocast and under activation checkpointing."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsagen import ops
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.ops.reference.compress import tensors_of

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


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_what_is_kept_for_the_backward_pass_grows_as_the_tokens(compress_type: str) -> None:
    """No probabilities are: those would grow as the square of a sequence's length."""
    kept = []
    for length in (16, 32, 64):
        args, keywords = Packed(seqlens=(length,), requires_grad=True).block(compress_type)
        held = [t for key in ("w_k", "w_v") for t in tensors_of(keywords[key])]
        held += [t for t in keywords.values() if isinstance(t, Tensor)]
        weights = {tensor.data_ptr() for tensor in held}
        sizes: dict[int, int] = {}

        def pack(
            tensor: Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights
        ) -> Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            o = ops.native_sparse_attention(*args, **keywords)
        assert o.requires_grad
        kept.append(sum(sizes.values()))
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) > 0  # the same for each token more
