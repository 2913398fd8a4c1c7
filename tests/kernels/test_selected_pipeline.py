"""Selected attention's backward pipeline on the CPU, its warps in random order (tests/gluon_on_cpu.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nsagen.cases.base import Sizes, cases_of
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from tests.gluon_on_cpu import Pipeline
from tests.support import check_case, load_kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="its plain kernels need the interpreter"
)


def run(seqlens, dtype="bfloat16", group=16, dim=64, v_dim=64, seed=0, kv_heads=1, topk_idx=None, **knobs):
    params = {"head_dim": dim, "v_head_dim": v_dim, "gqa_ratio": group, "block_size": 64}
    w = Workload.of("selected_attention", "backward", dtype=dtype, **params)
    (space,) = (s for s in spaces_of(w.op, "backward") if s.algorithm == "warp_specialized")
    schedule = Schedule.of(space.algorithm, {**space.default(w, KNOWN_TARGETS["cuda:90"]), **knobs})
    module = load_kernel(w, schedule)
    (name,) = (n for n in vars(module) if n.startswith("selected_attention_backward__"))
    setattr(module, name, Pipeline(Path(module.__file__), name, seed))
    case = cases_of(w).make_case(w, Sizes(seqlens, kv_heads), "cpu", seed=1, topk_idx=topk_idx)
    check_case(module, case)
