"""Skips what cannot run in this process: tests for a GPU, or for Triton's interpreter.

TRITON_INTERPRET is read when a kernel is decorated, so interpreter tests have a process of
their own: `TRITON_INTERPRET=1 pytest -m "kernel or interpreter"`; `make test` runs both.
"""

import atexit
import importlib.util
import os
import shutil
import tempfile

import hypothesis
import pytest
import torch

# The same examples in every run, and no limit that a busy machine would break.
hypothesis.settings.register_profile("nsagen", derandomize=True, deadline=None)
hypothesis.settings.load_profile("nsagen")

# Parallel workers inherit a terminal's width, which would fold what commands print.
os.environ.pop("COLUMNS", None)

QUICK = pytest.MonkeyPatch()
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.quick_interpreter import quicken

    quicken(QUICK)

# A machine that only runs kernels may lack what reads specs; its tests are not for there.
collect_ignore = []
if importlib.util.find_spec("pydantic") is None:
    collect_ignore = ["bad", "faults", "codegen", "model/test_shipped_specs.py", "spec"]
    collect_ignore += ["test_capacity.py", "test_cli.py", "test_cli_generate.py", "docs"]
    collect_ignore += ["test_packaging.py", "test_picture.py", "test_supply_chain.py"]
if importlib.util.find_spec("pydantic") is None or importlib.util.find_spec("optuna") is None:
    collect_ignore += ["tune", "kernels/test_measurer.py"]

# Parallel workers must not find each other's half-written kernels.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"nsagen-{worker}-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    no_gpu = pytest.mark.skip(reason="needs a GPU")
    no_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpreter") and not interpreting:
            item.add_marker(no_interpreter)


def pytest_runtest_logfinish() -> None:
    """End a parallel worker whose GPU is lost to it; the next tests get a new one.

    After an illegal access every later call in the process fails, whatever it does.
    """
    if worker and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
