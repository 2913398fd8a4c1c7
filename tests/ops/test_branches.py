"""Branches that are off take no part, and the values of their gates don't matter."""

import itertools
import math

import pytest
import torch

from nsagen import ops
from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.core.branches import BRANCHES, branches_on
from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference

from .inputs import Cached, Packed

SUBSETS = [s for n in (1, 2) for s in itertools.combinations(BRANCHES, n)]
MODULES = pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])


def without(gate, on):
    """The gate with 0 for what is off, and with NaN there."""
    off = torch.tensor([name not in on for name in BRANCHES])
    return gate.detach().masked_fill(off, 0.0), gate.detach().masked_fill(off, math.nan)


@pytest.mark.interpreter
@MODULES
@pytest.mark.parametrize("on", SUBSETS, ids="-".join)
def test_in_kernels(on, module, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    test_the_rest_is_summed(on, module)
    test_decoding(on, module)


@MODULES
@pytest.mark.parametrize("on", SUBSETS, ids="-".join)
def test_the_rest_is_summed(on, module):
    args, keywords = Packed(torch.float32).block()
    zeroed, unknown = without(args.pop(), on)
    expected = reference.native_sparse_attention(*args, zeroed, **keywords)
    o = module.native_sparse_attention(*args, unknown, **keywords, branches=on)
    assert relative_error(o, expected) <= THRESHOLDS[o.dtype]


@MODULES
@pytest.mark.parametrize("on", SUBSETS, ids="-".join)
def test_decoding(on, module):
    x = Cached()
    live = [row for row, position in enumerate(x.positions) if position >= 0]
    zeroed, unknown = without(x.gate, on)
    args = (x.q, x.k_cache, x.v_cache, x.topk_idx, *x.rows, x.o_compressed)
    sizes = {"block_size": 8, "window_size": 9}
    expected = reference.native_sparse_attention_decode(*args, zeroed, **sizes)
    o = module.native_sparse_attention_decode(*args, unknown, **sizes, branches=on)
    assert relative_error(o[live], expected[live]) <= THRESHOLDS[o.dtype]


@MODULES
def test_a_window_of_0_is_a_sliding_branch_that_is_off(module):
    args, keywords = Packed(torch.float64).block()
    expected = module.native_sparse_attention(*args, **keywords, branches=BRANCHES[:2])
    o = module.native_sparse_attention(*args, **{**keywords, "window_size": 0})
    assert torch.equal(o, expected)
    x = Cached(torch.float64)
    args = (x.q, x.k_cache, x.v_cache, x.topk_idx, *x.rows, x.o_compressed, x.gate)
    sizes = {"block_size": 8, "branches": BRANCHES[:2]}
    expected = module.native_sparse_attention_decode(*args, **sizes, window_size=9)
    o = module.native_sparse_attention_decode(
        *args, **{**sizes, "branches": BRANCHES, "window_size": 0}
    )
    assert torch.equal(o, expected)


@pytest.mark.parametrize("on", SUBSETS, ids="-".join)
def test_gradients(on):
    """The same as with gates of 0; the gates themselves get none."""
    args, keywords = Packed(torch.float64, requires_grad=True).block()
    *qkv, gate = args
    zeroed = without(gate, on)[0].requires_grad_()
    expected = reference.native_sparse_attention(*qkv, zeroed, **keywords)
    o = ops.native_sparse_attention(*qkv, gate, **keywords, branches=on)
    wanted = torch.autograd.grad(expected.sum(), (*qkv, zeroed))
    found = torch.autograd.grad(o.sum(), (*qkv, gate))
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        assert relative_error(ours, theirs) <= 1e-12
    for i, name in enumerate(BRANCHES):
        right = wanted[3][..., i] if name in on else torch.zeros_like(wanted[3][..., i])
        assert relative_error(found[3][..., i], right) <= 1e-12


@pytest.mark.parametrize(
    ("branches", "window", "text"),
    [
        (("selected", "slided"), 8, "got 'slided'"),
        ((), 8, "one branch must be on"),
        (("sliding",), 0, "one branch must be on"),
    ],
)
def test_wrong_branches(branches, window, text):
    with pytest.raises(InvalidInputError, match=text):
        branches_on("op", branches, window)
    args, keywords = Packed().block()
    keywords["window_size"] = window
    with pytest.raises(InvalidInputError, match=text):
        ops.native_sparse_attention(*args, **keywords, branches=branches)
