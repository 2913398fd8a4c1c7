"""A generated package with fake kernels: files that say which of them was launched."""

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from nsagen.core.workload import Workload
from nsagen.runtime import Bucket, Dispatcher

T = TypeVar("T")

KERNEL = "def launch(*args):\n    args[0].append(__name__.rpartition('.')[2])\n"

_numbers = itertools.count()


def selected(**changes: int | str) -> Workload:
    """A workload of selected attention."""
    params = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 4, "block_size": 64, **changes}
    dtype = str(params.pop("dtype", "float16"))
    return Workload.of("selected_attention", "forward", dtype=dtype, **params)


def at_once(count: int, call: Callable[[], T]) -> list[T]:
    """The results of a call that several threads begin at the same moment."""
    gate = threading.Barrier(count)

    def go(_: int) -> T:
        gate.wait()
        return call()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(go, range(count)))


def package(folder: Path, name: str, modules: tuple[str, ...]) -> Path:
    """Write `folder/generated/<name>` with a table of one workload and no limits on sizes."""
    root = folder / "generated" / name
    (root / "kernels").mkdir(parents=True)
    (root / "kernels" / "__init__.py").touch()
    for module in modules:
        (root / "kernels" / f"{module}.py").write_text(KERNEL)
    (root / "__init__.py").write_text("from .dispatcher import dispatcher\n")
    (root / "dispatcher.py").write_text(
        "from nsagen.runtime import Bucket, Dispatcher\n"
        "from nsagen.core.workload import Workload\n"
        f"TABLE = {{{selected()!r}: {{'cuda:90': ((Bucket(), '{modules[0]}'),)}}}}\n"
        f"dispatcher = Dispatcher(name='{name}', package=f'{{__package__}}.kernels', table=TABLE)\n"
    )
    return root


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Import name of a package with the kernels `small`, `large` and `first`."""
    name = f"fake_kernels_{os.getpid()}_{next(_numbers)}"
    (tmp_path / name).mkdir()
    for module in ("small", "large", "first"):
        (tmp_path / name / f"{module}.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]


@pytest.fixture
def dispatcher(kernels: str, monkeypatch: pytest.MonkeyPatch) -> Dispatcher:
    """One workload with two buckets for cuda:90 and one kernel for cuda:80; misses are errors."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
    table = {
        selected(): {
            "cuda:90": (
                (Bucket(tokens=(1, 100)), "small"),
                (Bucket(tokens=(101, 4096)), "large"),
            ),
            "cuda:80": ((Bucket(), "first"),),
        }
    }
    return Dispatcher("fake", kernels, table, on_missing="error")
