"""Skips what cannot run in this process: tests for a GPU, or for Triton's interpreter.

TRITON_INTERPRET is read when a kernel is decorated, so interpreter tests have a process of
their own: `TRITON_INTERPRET=1 pytest -m "kernel or interpreter"`; `make test` runs both.
"""

import atexit
import gc
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

# Imports and tests allocate much and leave few circles: a sixth of collection went into looking
# for them every 700 objects.
gc.set_threshold(50_000, 20, 50)

# Parallel workers inherit a terminal's width, which would fold what commands print.
os.environ.pop("COLUMNS", None)

QUICK = pytest.MonkeyPatch()
"""What makes Triton's interpreter quicker; undone, it is as it was installed."""

# A machine that only runs kernels may lack what reads specs; its tests are not for there.
collect_ignore = []
if importlib.util.find_spec("pydantic") is None:
    collect_ignore = ["aot", "bad", "cli", "codegen", "docs", "estimate", "faults", "records"]
    collect_ignore += ["export", "reports", "serve", "spec", "model/test_shipped_specs.py"]
    collect_ignore += ["bench/test_serve.py"]
    collect_ignore += ["test_packaging.py", "test_supply_chain.py"]
    collect_ignore += [
        f"kernels/test_{name}.py"
        for name in ("any_shape", "far_strides", "named_shapes", "quick_interpreter")
    ]
if importlib.util.find_spec("pydantic") is None or importlib.util.find_spec("optuna") is None:
    collect_ignore += ["tune", "kernels/test_measurer.py"]

# Parallel workers must not find each other's half-written kernels.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"nsagen-{worker}-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    if not worker and session.config.getoption("numprocesses", None):
        return  # this process only hands out tests, which wait for what it imports
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.quick_interpreter import quicken

        quicken(QUICK)
    import hypothesis

    # The same examples in every run, and no limit that a busy machine would break.
    hypothesis.settings.register_profile("nsagen", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("nsagen")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    found: set[Path] = set()
    no_gpu = pytest.mark.skip(reason="needs a GPU")
    no_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("kernel") or item.get_closest_marker("interpreter"):
            found.add(item.path)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpreter") and not interpreting:
            item.add_marker(no_interpreter)
    unseen = [path for path in found if not seen_by_make(path)]
    if unseen:
        raise pytest.UsageError(f"make test-interpreter must find the tests of {unseen}")


def pytest_collection_finish() -> None:
    """Keep garbage collections, in forks too, from visiting what collecting tests has imported."""
    gc.collect()
    gc.freeze()


def keeps_tiles_in_constants() -> bool:
    """Whether this process's interpreter keeps `TOPK - tile` a constant, which tl.minimum refuses.

    So it is in Triton 3.7 and 3.8: tests/kernels/test_constants.py. The compilers of all releases,
    and the interpreters of 3.6 and 3.9, make it a tile.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from nsagen.core.releases import installed_release

    return installed_release() in ((3, 7), (3, 8))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test that meets `keeps_tiles_in_constants` fails there by Triton's fault, whatever op."""
    try:
        return (yield)
    except Exception as error:
        said = str(error)  # quotes the cause, whose own quotes come escaped
        kept = "cannot convert" in said and "triton.language.core.tensor" in said
        if kept and keeps_tiles_in_constants():
            pytest.xfail(
                "Triton 3.7 and 3.8: the interpreter keeps a constant less a tile constant"
            )
        raise


def seen_by_make(path: Path) -> bool:
    """Whether `make test-interpreter` looks into a file of tests."""
    inside = path.is_relative_to(Path(__file__).parent / "kernels")
    return inside or bool(re.search(r"mark\.(interpreter|kernel)", path.read_text()))


def pytest_runtest_logfinish() -> None:
    """End a parallel worker whose GPU is lost to it; the next tests get a new one.

    After an illegal access every later call in the process fails, whatever it does.
    """
    if worker and (torch := sys.modules["torch"]).cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
