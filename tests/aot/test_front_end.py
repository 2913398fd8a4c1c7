"""Triton's own front end accepts what templates render to; the interpreter accepts more.

In the interpreter a name may hold a number before an `if` and a tensor after it; a compiler
refuses that. Compiling is slow, but its first step alone finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nsagen.aot.compile import RecordedLaunch, first_calls, recorded_launches, recording
from nsagen.cases.base import Sizes, cases_of
from nsagen.codegen.template import kernel_name, render, spaces_for
from nsagen.core.importing import import_file
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import BRANCH_KV, COMPRESS_TYPES, Workload
from tests.aot.conftest import check_accepted
from tests.kernels.test_named_shapes import CASES

TARGET = KNOWN_TARGETS["cuda:90"]
PAGED = Sizes((4095, 1000), kv_heads=4, capacity=8192, page_size=1024)

pytestmark = pytest.mark.usefixtures("front_end_alone")


def files_of(work: Workload, folder: Path) -> Iterator[Path]:
    """The default schedule of every algorithm that a workload has."""
    for space in spaces_for(work, TARGET):
        schedule = space.default_schedule(work, TARGET)
        path = folder / f"{kernel_name(work, schedule)}.py"
        path.write_text(render(work, schedule, "# test"))
        yield path


def accepts(work: Workload, folder: Path, sizes: Sizes | None = None) -> None:
    """Check every algorithm that a workload has."""
    for path in files_of(work, folder):
        check(recorded_launches(path, work, sizes), path)


def check(calls: Iterable[RecordedLaunch], path: Path) -> None:
    for call in calls:
        check_accepted(call, TARGET, path.stem)


def every_pair() -> Iterator[Any]:
    """Two types and whose keys: each pair for one of BRANCH_KV, and as slow tests for the other."""
    for (i, kind), (j, v_kind) in itertools.product(enumerate(COMPRESS_TYPES), repeat=2):
        for n, branch_kv in enumerate(BRANCH_KV):
            marks = [pytest.mark.slow] if (i + j + n) % 2 else []
            yield pytest.param(kind, v_kind, branch_kv, marks=marks)


@pytest.mark.parametrize(("kind", "v_kind", "branch_kv"), every_pair())
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if i % 2 else []) for i, name in enumerate(CASES)],
)
def test_shape(name: str, tmp_path: Path) -> None:
    accepts(CASES[name][0], tmp_path)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "statics"),
    [
        ("compressed_attention", {"kernel_size": 32, "kernel_stride": 16}),
        ("selected_attention", {"block_size": 64}),
        ("sliding_window_attention", {"window_size": 512}),
    ],
)
def test_chunks(op: str, statics: dict[str, int], pass_: str, tmp_path: Path) -> None:
    """Calls with offsets of the keys and positions of the first queries, by every algorithm."""
    params = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 16, **statics}
    work = Workload.of(op, pass_, dtype="bfloat16", **params)
    case = cases_of(work).make_case(work, Sizes((300,), 2), "meta")
    ends, starts = (torch.empty(n, dtype=torch.int32, device="meta") for n in (2, 1))
    chunks = [{"q_start": starts}]
    if "kernel_size" not in statics:
        chunks = [{"cu_seqlens_k": ends}, {"cu_seqlens_k": ends, "q_start": starts}]
    for path in files_of(work, tmp_path):
        module = import_file(path)
        for more in chunks:
            with recording(module) as calls:
                module.launch(*case.args, **more)
            check(first_calls(calls), path)
