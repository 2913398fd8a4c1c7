"""The canaries themselves: each kind of stray write is seen, and named."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, poisoned
from tests.support import check_case


def case_of(out: Tensor) -> Case:
    x = torch.arange(12.0).view(4, 3)
    return Case((x, out), {"o": out}, lambda: {"o": x * 2}, Cost(0, 0))


def module_of(launch: Callable[[Tensor, Tensor], object]) -> Any:
    return SimpleNamespace(launch=launch)


def right(x: Tensor, o: Tensor) -> None:
    o.copy_(x * 2)


def stray(at: int) -> Callable[[Tensor, Tensor], None]:
    """Right, but for one element written at an offset from the output's first."""

    def launch(x: Tensor, o: Tensor) -> None:
        right(x, o)
        o.as_strided((1,), (1,), o.storage_offset() + at).fill_(1.0)

    return launch


def outputs() -> list[Tensor]:
    """A plain output, and one with gaps between its rows."""
    return [poisoned((4, 3), torch.float32, "cpu"), poisoned((4, 5), torch.float32, "cpu")[:, :3]]


@pytest.mark.parametrize("out", outputs())
def test_a_right_kernel_passes_and_fills_the_cases_output(out: Tensor) -> None:
    case = case_of(out)
    check_case(module_of(right), case)
    assert torch.equal(case.outputs["o"], case.expected()["o"])


@pytest.mark.parametrize("at", [-1, -64, 12, 75])
def test_a_write_outside(at: int) -> None:
    with pytest.raises(AssertionError, match=rf"o: written outside, at elements \[{at}\D"):
        check_case(module_of(stray(at)), case_of(outputs()[0]))


def test_a_write_between_rows() -> None:
    with pytest.raises(AssertionError, match=r"o: written outside, at elements \[4\D"):
        check_case(module_of(stray(4)), case_of(outputs()[1]))


def test_a_write_past_an_input() -> None:
    def launch(x: Tensor, o: Tensor) -> None:
        right(x, o)
        x.as_strided((1,), (1,), x.storage_offset() + 12).fill_(0.0)

    with pytest.raises(AssertionError, match="an input: written outside"):
        check_case(module_of(launch), case_of(outputs()[0]))


def test_a_read_past_an_input_that_counts() -> None:
    def launch(x: Tensor, o: Tensor) -> None:
        right(x, o)
        o[3, 2] = x.as_strided((1,), (1,), x.storage_offset() + 12)[0]

    with pytest.raises(AssertionError, match="relative error inf"):
        check_case(module_of(launch), case_of(outputs()[0]))


def test_what_the_sanitizer_runs_exists() -> None:
    """`make sanitize` reads its tests from a file."""
    root = Path(__file__).parents[1]
    for line in (root / "tests" / "kernels" / "sanitize.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert not name or f"\ndef {name}(" in (root / path).read_text(), line
