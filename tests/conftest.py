"""Skips what cannot run in this process: tests for a GPU, or for Triton's interpreter.

TRITON_INTERPRET is read when a kernel is decorated, so interpreter tests have a process of
their own: `TRITON_INTERPRET=1 pytest -m interpreter`; `make test` runs both.
"""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    no_gpu = pytest.mark.skip(reason="needs a GPU")
    no_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpreter") and not interpreting:
            item.add_marker(no_interpreter)
