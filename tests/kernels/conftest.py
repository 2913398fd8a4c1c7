"""Kernel tests run on a GPU, or on the CPU when Triton's interpreter is on; else they skip."""

import os

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
