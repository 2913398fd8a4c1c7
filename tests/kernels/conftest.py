"""Kernel tests run on a GPU, or on the CPU when Triton's interpreter is on; else they skip.

In the interpreter half of the combinations run of a test's parameters; `make test-shapes` has the
other half.
"""

import os
from collections import Counter, defaultdict

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # not in the process that hands out tests, which wait for it

    runnable = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    skip = pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1 for the CPU interpreter")
    for item in items:
        if "tests/kernels" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.kernel)
        if torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
        if not runnable:
            item.add_marker(skip)
    if os.environ.get("TRITON_INTERPRET") == "1":
        for item in spared(items):
            item.add_marker(pytest.mark.slow)


def spared(items: list[pytest.Item]) -> list[pytest.Item]:
    """Every other combination of parameters that are multiplied, as on a chessboard.

    Each value of a parameter stays, and each pair of values where three are multiplied.
    """
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        axes = len(list(item.iter_markers("parametrize")))
        if "tests/kernels" in item.path.as_posix() and axes > 1:
            tests[item.nodeid.partition("[")[0]].append(item)
    return [item for test in tests.values() for item in odd_ones(test)]


def odd_ones(test: list[pytest.Item]) -> list[pytest.Item]:
    """Those whose values have an odd sum of places, each on its own axis."""
    axes = [mark.args[0] for mark in test[0].iter_markers("parametrize")]
    names = [axis.replace(" ", "").split(",") if isinstance(axis, str) else axis for axis in axes]
    places: dict[object, int] = {}
    sizes: Counter[int] = Counter()
    sums = []
    for item in test:
        values = item.callspec.params
        found = 0
        for axis, own in enumerate(names):
            key = (axis, *(id(values[name]) for name in own))
            if key not in places:
                places[key] = sizes[axis]
                sizes[axis] += 1
            found += places[key]
        sums.append(found)
    if sum(size > 1 for size in sizes.values()) < 2:
        return []
    return [item for item, n in zip(test, sums, strict=True) if n % 2]
