"""Inputs of `nsagen verify`: every edge, in every layout that a kernel takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, cases_of, relative_error
from nsagen.cases.sizes import sizes_for, takes_lists
from nsagen.cases.verify import (
    calls_interpreted,
    calls_on_gpu,
    for_interpreter,
    launch_strided,
)
from nsagen.codegen.plan import Variant
from nsagen.codegen.template import kernel_name
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from nsagen.spec import load_spec


def scaled(x: Tensor, w: Tensor, y: Tensor, scale: float) -> None:
    """y = scale x w, as a kernel that takes x in any strides and w contiguous."""
    if not w.is_contiguous():
        raise ValueError(f"scaled: w must be contiguous; got strides {w.stride()}")
    y.copy_(scale * x * w)


def careless(x: Tensor, w: Tensor, y: Tensor, scale: float) -> None:
    """The same, but with x where its rows would lie if it were contiguous."""
    scaled(x.as_strided(y.shape, y.stride()), w, y, scale)


def run(launch: Callable[..., None]) -> tuple[list[str], float]:
    """Which tensors a kernel took in strides, and its error."""
    x, w = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    y = torch.full_like(x, float("nan"))
    case = Case((x, w, y, 2.0), {"y": y}, lambda: {"y": 2.0 * x * w}, Cost(0.0, 0.0))
    views = launch_strided(launch, case)
    return views, relative_error(y, case.expected()["y"])


def test_strides_that_a_kernel_takes_and_those_that_it_refuses_by_name() -> None:
    assert run(scaled) == (["x"], 0.0)


def test_strides_that_a_kernel_overlooks() -> None:
    assert run(careless) == (["x"], float("inf"))


STEP = {"head_dim": 32, "v_head_dim": 32, "gqa_ratio": 2, "block_size": 64, "topk": 4}

FAMILY = ("minimax_m3", "minicpm4", "minicpm_sala", "moba")


def of_blocks(name: str) -> list[tuple[Workload, int]]:
    """The forward and backward workloads of a spec that have blocks, and the topk of its calls."""
    spec = load_spec(name)
    listed = [w for w in spec.workloads() if w.pass_ != "decode"]
    listed = [w for w in listed if takes_lists(w) or w.op == "block_selection"]
    return [(w, int(w.topk) if w.op == "block_selection" else spec.topk_of(w)) for w in listed]


@pytest.mark.parametrize("calls", [calls_on_gpu, calls_interpreted])
@pytest.mark.parametrize("name", FAMILY)
def test_each_member_is_verified_with_its_own_topk_and_more_blocks_than_that(
    name: str, calls: Callable[..., Any]
) -> None:
    """MiniCPM's 96 of 64 tokens and MoBA's 12 of 4096 too."""
    for workload, topk in of_blocks(name):
        made, block = [sizes for _, sizes in calls(workload, topk)], int(workload.block_size)
        assert any({0, 1} <= set(sizes.seqlens) for sizes in made)
        if takes_lists(workload):
            assert topk in {sizes.topk for sizes in made}
        sparse = [
            s for s in made if max(s.seqlens) > (s.topk if takes_lists(workload) else topk) * block
        ]
        assert sparse
        for sizes in sparse:
            end = max(sizes.seqlens)
            first = end - max(sizes.rows)
            assert first // block < (end - 1) // block, "queries must lie in two blocks"


@pytest.mark.parametrize("name", FAMILY)
def test_the_interpreter_gets_few_queries(name: str) -> None:
    """It runs a program for each of them and head, one after another."""
    for workload, topk in of_blocks(name):
        for _, sizes in calls_interpreted(workload, topk):
            assert sum(sizes.rows) <= 200
            if max(sizes.rows) < max(sizes.seqlens) and takes_lists(workload):
                assert sizes.kv_heads * max(sizes.rows) * topk * int(workload.block_size) < 100_000
            if takes_lists(workload) and workload.op == "selected_attention":
                visible = min(max(sizes.seqlens) // int(workload.block_size) + 1, sizes.topk)
                keys = visible * int(workload.block_size)
                assert sizes.kv_heads * sum(sizes.rows) * keys <= 150_000


def test_the_interpreter_runs_what_differs_in_warps_stages_and_programs_once(
    tmp_path: Path,
) -> None:
    w = Workload.of("selected_attention", "decode", dtype="bfloat16", **STEP)
    base = {"block_n": 64, "combine_warps": 4, "num_stages": 3, "num_warps": 4, "programs": 396}

    def code(**changes: int) -> str:
        schedule = Schedule.of("split_kv", base | changes)
        variant = Variant(kernel_name(w, schedule), w, schedule, uses=())
        workload, path, code = for_interpreter(variant, tmp_path)
        assert workload.dtype == "float16"
        assert "PROGRAMS = 32\n" in path.read_text()
        return code

    assert code() == code(num_warps=8, num_stages=2, combine_warps=1, programs=132)
    assert code() != code(block_n=32)


def test_both_layouts_are_verified() -> None:
    for workload, topk in of_blocks("minicpm4"):
        assert {apart for apart, _ in calls_interpreted(workload, topk)} == {False, True}
        assert {apart for apart, _ in calls_on_gpu(workload, topk)} == {False, True}


ROWS = [*range(40, 45), *range(45, 48)]
"""The last five queries of 45 tokens, and all three of a second sequence."""
CHUNK = Sizes((0, 45, 3), topk=4, queries=5)


def test_only_queries_count() -> None:
    assert CHUNK.over_queries(lambda n: n * (n + 1) // 2) == 41 + 42 + 43 + 44 + 45 + 1 + 2 + 3


def among_all(x: Tensor, dim: int = 0, fill: float = 0.0) -> Tensor:
    """The chunk's rows where they lie among all 48 tokens."""
    shape = [*x.shape]
    shape[dim] = 48
    return x.new_full(shape, fill).index_copy(dim, torch.tensor(ROWS), x)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("forced", [{}, {"init_blocks": 0, "local_blocks": 2}])
def test_the_last_queries_attend_as_in_whole_sequences(pass_: str, forced: dict[str, int]) -> None:
    shape = {"head_dim": 16, "v_head_dim": 16, "gqa_ratio": 2, "block_size": 8}
    params = shape | (forced if pass_ == "forward" else {})
    w = Workload.of("selected_attention", pass_, dtype="float32", **params)
    case = cases_of(w).make_case(w, CHUNK, "cpu")
    given: list[Any] = list(case.args)
    do = given.pop(0) if pass_ == "backward" else None
    q, k, v, topk_idx, cu_seqlens, *_ = given
    cu_seqlens_k = torch.tensor([0, 0, 45, 48], dtype=torch.int32)
    assert cu_seqlens.tolist() == [0, 0, 5, 8]
    assert any(isinstance(x, Tensor) and torch.equal(x, cu_seqlens_k) for x in given)
    leaves = [x.double().requires_grad_() for x in (among_all(q), k, v)]
    blocks = among_all(topk_idx, 1, -1)
    o, lse = reference.selected_attention(*leaves, blocks, cu_seqlens_k, block_size=8)
    if do is None:
        wanted = {"o": o[ROWS], "lse": lse[ROWS]}
    else:
        dq, dk, dv = torch.autograd.grad(o, leaves, among_all(do).double())
        wanted = {"dq": dq[ROWS], "dk": dk, "dv": dv}
    for name, found in case.expected().items():
        torch.testing.assert_close(found, wanted[name])


def test_the_last_queries_select_as_in_whole_sequences() -> None:
    windows: dict[str, Any] = {"kernel_size": 4, "kernel_stride": 2}
    rule = {**windows, "block_size": 8, "topk": 4, "init_blocks": 1, "local_blocks": 2}
    w = Workload.of("block_selection", "forward", dtype="float32", head_dim=16, gqa_ratio=2, **rule)
    case = cases_of(w).make_case(w, CHUNK, "cpu")
    q, k, lse, _, cu_windows, _, _, q_start = case.args
    assert q_start.tolist() == [0, 40, 0]
    ends = torch.tensor([0, 0, 45, 48], dtype=torch.int32)
    whole = reference.compressed_lse(among_all(q), k, ends, cu_windows, **windows)
    torch.testing.assert_close(lse, whole[ROWS])
    wanted = reference.block_selection(among_all(q), k, whole, ends, cu_windows, **rule)
    assert torch.equal(case.expected()["topk_idx"], wanted[:, ROWS])


def test_lengths_and_lists_are_drawn_from_the_whole_contract() -> None:
    """Empty and short sequences; lists with repeats, numbers that name no block, in any order."""
    sizes = {"head_dim": 16, "v_head_dim": 16, "gqa_ratio": 2, "block_size": 16}
    for pass_ in ("forward", "backward"):
        w = Workload.of("selected_attention", pass_, dtype="float32", **sizes)
        drawn = sizes_for(w)
        assert {0, 1} < set(drawn.seqlens)
        assert any(n % 16 for n in drawn.seqlens)
        args = cases_of(w).make_case(w, drawn, "cpu").args
        (lists,) = (
            x for x in args if isinstance(x, Tensor) and x.dtype == torch.int32 if x.ndim == 3
        )
        names_a_block = (lists >= 0) & (lists < 2**20)
        assert (lists[..., 0] == -1).any()
        assert ((lists < -1) | (lists > 2**20)).any()
        assert ((lists.diff(dim=-1) < 0) & names_a_block[..., 1:]).any()
        ordered = torch.where(names_a_block, lists, -1).sort(-1).values
        assert ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any()


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("band", [{}, {"block_size": 8}])
def test_the_last_queries_see_the_whole_sequences_window(pass_: str, band: dict[str, int]) -> None:
    shape = {"head_dim": 16, "v_head_dim": 16, "gqa_ratio": 2, "window_size": 16}
    w = Workload.of("sliding_window_attention", pass_, dtype="float32", **shape, **band)
    case = cases_of(w).make_case(w, CHUNK, "cpu")
    given: list[Any] = list(case.args)
    do = given.pop(0) if pass_ == "backward" else None
    q, k, v, *_ = given
    ends = torch.tensor([0, 0, 45, 48], dtype=torch.int32)
    leaves = [x.double().requires_grad_() for x in (among_all(q), k, v)]
    if band:
        local = {"block_size": 8, "init_blocks": 0, "local_blocks": 2}
        o, lse = reference.forced_blocks_attention(*leaves, ends, **local)
    else:
        o, lse = reference.sliding_window_attention_forward(*leaves, ends, window_size=16)
    if do is None:
        wanted = {"o": o[ROWS], "lse": lse[ROWS]}
    else:
        dq, dk, dv = torch.autograd.grad(o, leaves, among_all(do).double())
        wanted = {"dq": dq[ROWS], "dk": dk, "dv": dv}
    for name, found in case.expected().items():
        torch.testing.assert_close(found, wanted[name])
    assert any(isinstance(x, Tensor) and torch.equal(x, ends) for x in given)
