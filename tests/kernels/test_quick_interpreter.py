"""The quicker interpreter of the tests computes what Triton's own does, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from nsagen.cases.base import cases_of
from nsagen.cases.sizes import Sizes
from nsagen.core.workload import Workload
from nsagen.reports.target_support import representative
from nsagen.spec import load_spec
from tests.conftest import QUICK
from tests.quick_interpreter import quicken
from tests.support import load_kernel

pytestmark = pytest.mark.interpreter


@contextmanager
def tritons_own() -> Iterator[None]:
    """Triton's interpreter as it is installed, which has rewritten no function yet."""
    QUICK.undo()
    interpreter.InterpretedFunction.rewritten_fn.clear()
    assert interpreter._patch_lang.__module__ == interpreter.__name__
    try:
        yield
    finally:
        quicken(QUICK)


def launched(workload: Workload) -> dict[str, Tensor]:
    """The outputs of a workload's default kernel."""
    sizes = Sizes((3, 37), kv_heads=1, capacity=64)
    case = cases_of(workload).make_case(workload, sizes, torch.device("cpu"), seed=1)
    load_kernel(workload).launch(*case.args)
    return case.outputs


@pytest.mark.parametrize("workload", representative(load_spec("tiny")), ids=str)
def test_every_op_has_the_same_bits(workload: Workload) -> None:
    ours = launched(workload)
    with tritons_own():
        theirs = launched(workload)
    assert ours.keys() == theirs.keys()
    for name, out in ours.items():
        assert torch.equal(out.view(torch.uint8), theirs[name].view(torch.uint8)), name


@triton.jit
def _helper(x):
    return x * 2


@triton.jit
def _uses_a_helper(a, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(a + at, _helper(tl.load(a + at)))


@triton.jit
def _fails_in_a_helper(a):
    tl.store(a + tl.arange(0, 3), _helper(1))


def test_a_launch_leaves_the_language_as_it_was() -> None:
    """After a failure too: a kernel that comes later finds functions that it can patch."""
    before = tl.load, tl.tensor.__add__
    with pytest.raises(interpreter.InterpreterError):
        _fails_in_a_helper[(1,)](torch.ones(4))
    a = torch.arange(4.0)
    _uses_a_helper[(1,)](a, 4)
    assert a.tolist() == [0, 2, 4, 6]
    assert (tl.load, tl.tensor.__add__) == before
