"""Triton's own front end accepts what templates render to; the interpreter accepts more.

In the interpreter a name may hold a number before an `if` and a tensor after it; a compiler
refuses that. Compiling is slow, but its first step alone finds it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from triton.compiler.compiler import ASTSource

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.cases.base import Sizes
from nsagen.codegen.template import kernel_name, render, spaces_for
from nsagen.core.errors import BuildError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import BRANCH_KV, COMPRESS_TYPES, Workload
from tests.kernels.test_named_shapes import CASES

TARGET = KNOWN_TARGETS["cuda:90"]
PAGED = Sizes((4095, 1000), kv_heads=4, capacity=8192, page_size=1024)


class _Accepted(Exception):
    """Raised in place of all steps after the front end."""


@pytest.fixture(autouse=True)
def _front_end_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_ir = ASTSource.make_ir

    def accept(*args: Any) -> None:
        make_ir(*args)
        raise _Accepted

    monkeypatch.setattr(ASTSource, "make_ir", accept)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def accepts(work: Workload, folder: Path, sizes: Sizes | None = None) -> None:
    """Check the default schedule of every algorithm that a workload has."""
    for space in spaces_for(work, TARGET):
        schedule = space.default_schedule(work, TARGET)
        path = folder / f"{kernel_name(work, schedule)}.py"
        path.write_text(render(work, schedule, "# test"))
        for call in recorded_launches(path, work, sizes):
            with pytest.raises(BuildError) as stopped:
                compile_launch(call, TARGET, path.stem)
            assert isinstance(stopped.value.__cause__, _Accepted), stopped.value


@pytest.mark.parametrize("branch_kv", BRANCH_KV)
@pytest.mark.parametrize(("kind", "v_kind"), [*itertools.product(COMPRESS_TYPES, repeat=2)])
def test_keys_and_values_of_any_two_types(
    kind: str, v_kind: str, branch_kv: str, tmp_path: Path
) -> None:
    params = {
        "compress_type": kind,
        "v_compress_type": v_kind,
        "branch_kv": branch_kv,
        "head_dim": 16,
        "v_head_dim": 24,
        "gqa_ratio": 2,
        "kernel_size": 8,
        "kernel_stride": 4,
        "with_pe": True,
        "mlp_hidden": 24 if "mlp" in (kind, v_kind) else 0,
    }
    work = Workload.of("cache_append", "decode", dtype="float16", **params)
    accepts(work, tmp_path)
    accepts(work, tmp_path, PAGED)


@pytest.mark.parametrize("name", list(CASES))
def test_shape(name: str, tmp_path: Path) -> None:
    accepts(CASES[name][0], tmp_path)
