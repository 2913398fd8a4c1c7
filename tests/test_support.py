"""What tests share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nsagen.core.workload import Workload
from tests.kernels.conftest import odd_ones
from tests.support import load_kernel


def test_a_kernel_that_is_there_is_not_written_again() -> None:
    """Processes share the folder: one that reads must not find what another has just emptied."""
    work = Workload.of("rope", "forward", dtype="float32", head_dim=16)
    path = Path(load_kernel(work).__file__ or "")
    before = path.stat()
    load_kernel.cache_clear()
    load_kernel(work)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def parametrized(*axes: tuple[str, list[tuple[Any, ...]]]) -> list[Any]:
    """Stand-ins for the items of a test with these parameters."""
    marks = [pytest.mark.parametrize(names, values).mark for names, values in axes]

    def item(chosen: tuple[tuple[Any, ...], ...]) -> SimpleNamespace:
        named: dict[str, Any] = {}
        for (names, _), values in zip(axes, chosen, strict=True):
            named |= zip(names.split(", "), values, strict=True)

        def iter_markers(_: str) -> Iterator[pytest.Mark]:
            return iter(marks)

        return SimpleNamespace(callspec=SimpleNamespace(params=named), iter_markers=iter_markers)

    return [item(chosen) for chosen in product(*(values for _, values in axes))]


def test_half_of_the_combinations_have_every_pair() -> None:
    sizes, types = [(8, 4), (16, 4), (32, 32)], [("float32",), ("float16",)]
    items = parametrized(("size, stride", sizes), ("dtype", types), ("causal", [(True,), (False,)]))
    odd = odd_ones(items)
    kept = [item.callspec.params for item in items if item not in odd]
    assert len(kept) == len(odd) == 6
    for a, b in combinations(("size", "dtype", "causal"), 2):
        pairs = {(item.callspec.params[a], item.callspec.params[b]) for item in items}
        assert {(params[a], params[b]) for params in kept} == pairs


def test_combinations_of_one_axis_all_stay() -> None:
    assert not odd_ones(parametrized(("size", [(1,), (2,), (3,)]), ("dtype", [("float32",)])))
