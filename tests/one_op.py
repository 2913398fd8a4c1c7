"""A world with one op: templates, cases and a spec for `gated_sum` alone.

Tests of what happens around kernels (build, check, verify) use it, so that they are quick and
do not depend on the shipped templates.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nsagen.cases.base import Case, Cost, Sizes, poisoned
from nsagen.codegen import template
from nsagen.core.paths import templates_dir
from nsagen.core.workload import STATIC_PARAMS, Workload

TEMPLATE = '''{# The gated sum, one element after another: a stand-in that any reader can check. #}
{{ header }}
"""o = gate[..., 0] * o_compressed + gate[..., 1] * o_selected + gate[..., 2] * o_sliding."""

import triton
import triton.language as tl

V_HEAD_DIM = tl.constexpr({{ v_head_dim }})
BLOCK = tl.constexpr({{ block }})


@triton.jit
def {{ kernel_name }}(a, b, c, gate, o, size):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = at // V_HEAD_DIM
    total = tl.zeros([BLOCK], tl.float32)
    total += tl.load(gate + row * 3, at < size).to(tl.float32) * tl.load(a + at, at < size)
    total += tl.load(gate + row * 3 + 1, at < size).to(tl.float32) * tl.load(b + at, at < size)
    total += tl.load(gate + row * 3 + 2, at < size).to(tl.float32) * tl.load(c + at, at < size)
    tl.store(o + at, total{{ mistake }}, at < size)


def launch(o_compressed, o_selected, o_sliding, gate, o):
    """Run over every element of o."""
    if not all(x.is_contiguous() for x in (o_compressed, o_selected, o_sliding, gate)):
        raise ValueError("o_compressed, o_selected, o_sliding and gate must be contiguous")
    grid = (triton.cdiv(o.numel(), {{ block }}),)
    {{ kernel_name }}[grid](o_compressed, o_selected, o_sliding, gate, o, o.numel())
'''

SPACE = """
from nsagen.codegen.space import PowerOfTwo, ScheduleSpace

SPACES = (
    ScheduleSpace(
        op="gated_sum",
        pass_="forward",
        algorithm="elementwise",
        knobs=(PowerOfTwo("block", 64, 256, "elements a program"),),
        derive=lambda workload, schedule: {"mistake": ""},
        default=lambda workload, target: {"block": 128 if target.arch == "80" else 256},
    ),
)
"""

SPEC = """
name: few
attention: {head_dim: 32, v_head_dim: [32, 48], gqa_ratio: 1, dtype: DTYPE, compress_type: avgpool,
  kernel_size: 8, kernel_stride: 4, block_size: 16, topk: 4, window_size: 32}
"""


def make_case(workload: Workload, sizes: Sizes, device: torch.device, seed: int = 0) -> Case:
    """A case of `gated_sum`, with its formula written out."""
    random = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, workload.dtype)
    shape = (sizes.tokens, sizes.kv_heads)
    branches = [
        torch.randn(*shape, int(workload.v_head_dim), generator=random).to(device, dtype)
        for _ in range(3)
    ]
    gate = torch.rand(*shape, 3, generator=random).to(device, dtype)
    out = poisoned(tuple(branches[0].shape), dtype, device)

    def expected() -> dict[str, torch.Tensor]:
        parts = [gate[..., i, None].double() * branch.double() for i, branch in enumerate(branches)]
        return {"o": torch.stack(parts).sum(0)}

    return Case((*branches, gate, out), {"o": out}, expected, Cost(0, 0))


@pytest.fixture
def one_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `few.yaml` and `templates/`; nsagen knows `gated_sum` and nothing else."""
    templates = tmp_path / "templates"
    for shared in ("package", "shared"):
        shutil.copytree(templates_dir() / shared, templates / shared)
    (templates / "gated_sum").mkdir()
    (templates / "gated_sum" / "forward_elementwise.py.j2").write_text(TEMPLATE)
    (templates / "gated_sum" / "space.py").write_text(SPACE)
    (tmp_path / "few.yaml").write_text(SPEC.replace("DTYPE", "float32"))
    cases = ModuleType("nsagen.cases.gated_sum")
    cases.make_case = make_case  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, cases.__name__, cases)
    monkeypatch.setattr(template, "templates_dir", lambda: templates)
    monkeypatch.chdir(tmp_path)
    known = dict(STATIC_PARAMS)
    for key in known.keys() - {("gated_sum", "forward")}:
        del STATIC_PARAMS[key]
    template.forget()
    yield tmp_path
    STATIC_PARAMS.clear()
    STATIC_PARAMS.update(known)  # in the old order, which specs and pages follow
    template.forget()
