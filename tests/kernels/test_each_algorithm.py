"""Every algorithm once, at sizes that a sanitizer gets through; see tests/sanitize.py.

Inputs and expected results are computed on the CPU, so that a sanitizer watches the kernels alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from nsagen.cases.base import Case, Sizes, cases_of
from nsagen.codegen.template import space_for, spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import (
    CACHE_DTYPES,
    COMPRESS_TYPES,
    FORCED,
    STATIC_PARAMS,
    Param,
    Workload,
)
from nsagen.ops import reference
from tests.support import check_outputs, is_hopper, kernel_device, load_kernel

pytestmark = pytest.mark.gpu

SM90 = KNOWN_TARGETS["cuda:90"]

SHAPE: dict[str, Param] = {
    "head_dim": 72,
    "v_head_dim": 80,
    "index_head_dim": 40,
    "gqa_ratio": 6,
    "kernel_size": 4,
    "kernel_stride": 2,
    "block_size": 16,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 1,
    "window_size": 32,
    "with_pe": True,
    "mlp_hidden": 24,
}
"""Heads and groups that tiles pad, in a dtype that matrix units multiply."""
FOR_HOPPER: dict[str, Param] = {
    **SHAPE,
    "head_dim": 64,
    "v_head_dim": 64,
    "gqa_ratio": 8,
    "kernel_size": 2,
    "kernel_stride": 1,
    "block_size": 32,
    "window_size": 64,
}
SEQLENS = (70, 0, 5)
"""Several tiles of a pipeline, none, and a part of one."""
WITH_WINDOWS = (140, 0, 5)
"""For pipelines whose keys are windows: the last tiles have two steps of 128."""
POSITIONS = (-1, 0, 2, 3, 40, 66)
"""Idle, the first token, before and at the first window's end, and several blocks and windows."""


GATED = {
    ("sliding_window_attention", "forward"): False,
    ("selected_attention", "forward"): True,
}
"""Whose epilogue can be the gated sum of all branches, and whether it starts from forced blocks."""


class Call(NamedTuple):
    work: Workload
    algorithm: str
    page_size: int | None = None
    unions: bool = True
    gated: bool = False
    capacity: int = 96

    def __str__(self) -> str:
        more = f" pages of {self.page_size}" * (self.page_size is not None)
        more += " apart" * (not self.unions) + " gated" * self.gated
        more += f" capacity {self.capacity}" * (self.capacity != 96)
        return f"{self.work} {self.algorithm}{more}"


def variants(op: str, pass_: str) -> list[dict[str, Param]]:
    """Parameters of an op beside its sizes: what a spec can leave out, and what a call asks for."""
    if op in ("compress", "cache_append"):
        kinds: list[dict[str, Param]] = [{"compress_type": kind} for kind in COMPRESS_TYPES]
        narrow = CACHE_DTYPES if op == "cache_append" else ()
        return kinds + [{"compress_type": "avgpool", "cache_dtype": x} for x in narrow]
    if op == "block_selection":
        form = {"score_norm": "softmax", "score_heads": "each", "score_pool": "max"}
        products = {**form, "score_norm": "none"}
        return [{}, form, {**products, "gqa_ratio": 8, "kernel_size": 4, "kernel_stride": 4}]
    if pass_ == "decode" and op in ("compressed_attention", "native_sparse_attention"):
        return [{}, *({"cache_dtype": x} for x in CACHE_DTYPES)]
    return [{}]


def workloads(op: str, pass_: str, shape: dict[str, Param]) -> list[Workload]:
    if shape is FOR_HOPPER and (op, pass_) == ("selected_attention", "backward"):
        shape = {**shape, "block_size": 64}
    if (op, pass_) == ("selected_attention", "decode"):
        shape = {**shape, "block_size": 64}  # a list of several tiles, which programs share
    names = STATIC_PARAMS[op, pass_]
    forced = FORCED.get((op, pass_), ())
    asked = [(), *({name for name in forced if name == "block_size"}, forced)]
    found = []
    for more in variants(op, pass_):
        for extra in asked:
            wanted = {*names, *extra, *(("mlp_hidden",) if "mlp" in more.values() else ())}
            params = {name: n for name, n in shape.items() if name in wanted} | more
            found.append(Workload.of(op, pass_, dtype="float16", **params))
    return list(dict.fromkeys(found))


def calls(general: bool) -> list[Call]:
    """Each algorithm of each op, with whatever makes other code of its template."""
    found = []
    shape = SHAPE if general else FOR_HOPPER
    for op, pass_ in STATIC_PARAMS:
        for space in spaces_of(op, pass_):
            works = workloads(op, pass_, shape) if space.general == general else []
            for work in filter(space.supports, works):
                paged = pass_ == "decode" and op != "linear"
                narrow = "cache_dtype" in dict(work.params)
                found += [Call(work, space.algorithm)] * (not narrow)
                page_size = int(dict(work.params).get("block_size", 16))
                found += [Call(work, space.algorithm, page_size=page_size)] * paged
                # where its caches hold more than one program takes, a second kernel follows
                split = space.algorithm == "whole_rows"
                found += [Call(work, space.algorithm, capacity=1200)] * split
                apart = space.algorithm == "union_tiles"
                found += [Call(work, space.algorithm, unions=False)] * apart
                gated = GATED.get((op, pass_)) == ("local_blocks" in dict(work.params))
                found += [Call(work, space.algorithm, gated=True)] * gated
    return found


def with_gates(case: Case, place: int) -> Case:
    """The case whose o is the gated sum with two other branches, itself at a place among three."""
    o = case.outputs["o"]
    random = torch.Generator().manual_seed(2)
    one, two = (torch.randn(o.shape, generator=random).to(o.dtype) for _ in range(2))
    gate = torch.rand((*o.shape[:2], 3), generator=random).to(o.dtype)

    def expected() -> dict[str, torch.Tensor]:
        found = case.expected()
        branches = [one.double(), two.double()]
        branches.insert(place, found["o"])
        return {**found, "o": reference.gated_sum(*branches, gate.double())}

    of_keys = (None, None) if place == 2 else ()  # the other one has them already
    return Case((*case.args, *of_keys, one, two, gate), case.outputs, expected, case.cost)


def launch(module: ModuleType, case: Case) -> None:
    """Let a kernel work on copies of a case's tensors, which then get what it wrote."""
    tensors = [x for x in case.args if isinstance(x, torch.Tensor)]
    copies = {id(x): x.to(kernel_device()) for x in tensors}
    module.launch(*(copies.get(id(x), x) for x in case.args))
    for x in tensors:
        x.copy_(copies[id(x)])


def module_of(call: Call) -> ModuleType:
    """The kernel of a call, of the default schedule of its algorithm."""
    space = space_for(call.work, call.algorithm)
    return load_kernel(call.work, space.default_schedule(call.work, SM90))


def sizes_of(call: Call) -> Sizes:
    work, general = call.work, space_for(call.work, call.algorithm).general
    if work.pass_ == "decode":
        return Sizes(POSITIONS, 2, capacity=call.capacity, page_size=call.page_size, any_order=True)
    with_windows = not general and "kernel_size" in dict(work.params)
    return Sizes(WITH_WINDOWS if with_windows else SEQLENS, 1, any_order=True)


def simplify(module: ModuleType, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes all tiles of a pipeline, so that its rings of buffers wrap around."""
    monkeypatch.setattr(module, "processors", lambda x: 1, raising=False)
    monkeypatch.setattr(module, "unions_pay", lambda *args: call.unions, raising=False)


def check(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    work, module = call.work, module_of(call)
    simplify(module, call, monkeypatch)
    case = cases_of(work).make_case(work, sizes_of(call), "cpu")
    if call.gated:
        case = with_gates(case, place=2 if work.op == "sliding_window_attention" else 1)
    launch(module, case)
    check_outputs(case.outputs, case.expected())


@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("call", calls(general=False), ids=str)
def test_pipelines(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    check(call, monkeypatch)


@pytest.mark.parametrize("call", calls(general=True), ids=str)
def test_plain_kernels(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    check(call, monkeypatch)
