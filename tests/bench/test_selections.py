"""Selections that a model learned, as benchmarks read them."""

from dataclasses import replace

import pytest
import torch

from nsagen.bench.selections import check_selection, learned_selection
from nsagen.bench.shape import Shape
from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference


def blocks_in_common(topk_idx, tokens):
    """Mean number of blocks in the union of neighbouring tokens' lists."""
    blocks = int(topk_idx.max()) + 1
    taken = torch.zeros(*topk_idx.shape[:2], blocks + 1, dtype=torch.bool)
    taken.scatter_(-1, topk_idx.masked_fill(topk_idx < 0, blocks).long(), True)
    return taken[..., :-1].unflatten(1, (-1, tokens)).any(2).sum(-1).double().mean()


def test_lists_are_as_block_selection_writes_them():
    """Ascending, then -1, none past the token's own block, the forced ones among them."""
    topk_idx = learned_selection(3, 20480, "cpu")
    assert topk_idx.shape == (3, 20480, 16)
    assert topk_idx.dtype == torch.int32
    assert torch.equal(topk_idx[0], topk_idx[2])
    token = torch.arange(20480)
    assert (topk_idx <= (token // 64)[:, None]).all()
    assert ((topk_idx[..., 1:] > topk_idx[..., :-1]) | (topk_idx[..., 1:] == -1)).all()
    assert ((topk_idx >= 0).sum(-1) == (token // 64 + 1).clamp(max=16)).all()
    forced = reference.forced_blocks(token, block_size=64, init_blocks=1, local_blocks=2)
    found = (forced[..., None] == topk_idx[:, :, None, :]).any(-1) | (forced < 0)
    assert found.all()


@pytest.mark.parametrize(("tokens", "union"), [(4, 38.5), (8, 62.5), (16, 94.0)])
def test_neighbours_share_blocks(tokens, union):
    """In the second half of the text, and the same where a longer sequence repeats it."""
    topk_idx = learned_selection(2, 24576, "cpu")
    for half in (topk_idx[:, 8192:16384], topk_idx[:, 16384:]):
        assert abs(blocks_in_common(half, tokens) - union) < 0.1


def test_what_the_file_does_not_say_is_refused():
    check_selection("learned", Shape())
    check_selection("random", replace(Shape(), topk=8))
    with pytest.raises(InvalidInputError, match="must be one of random, learned; got 'text'"):
        check_selection("text", Shape())
    with pytest.raises(InvalidInputError, match=r"needs block_size 64, topk 16.*got topk 8"):
        check_selection("learned", replace(Shape(), topk=8))
