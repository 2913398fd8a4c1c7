"""The Hopper pipelines compile anywhere, to warpgroup products and without spills to mention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nsagen.aot.compile import all_launches, compile_launch, compile_variant, first_calls
from nsagen.aot.resources import Resources, read_resources
from nsagen.cases.base import Case, Sizes, cases_of
from nsagen.codegen.template import kernel_name, render, space_for, spaces_for, spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Workload

SM90 = KNOWN_TARGETS["cuda:90"]
Args = tuple[Any, ...]
STATICS = {
    "compressed_attention": {"kernel_size": 32, "kernel_stride": 16},
    "sliding_window_attention": {"window_size": 512},
}


def workload(
    op: str, group: int = 16, dtype: str = "bfloat16", dim: int = 128, pass_: str = "forward"
) -> Workload:
    params = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": group}
    return Workload.of(op, pass_, dtype=dtype, **params, **STATICS[op])


def test_selection_compiles_to_warpgroup_products_without_a_gpu(tmp_path):
    statics = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 16}
    statics |= {"init_blocks": 1, "local_blocks": 2, "head_dim": 128, "gqa_ratio": 16}
    w = Workload.of("block_selection", "forward", dtype="bfloat16", **statics)
    (space,) = (
        s for s in spaces_of("block_selection", "forward") if s.algorithm == "warp_specialized"
    )
    schedule = space.default_schedule(w, SM90)
    path = tmp_path / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    scores, select = compile_variant(path, w, SM90)
    assert (scores.matrix, scores.spill_bytes) == ("wgmma", 0)
    assert (select.kernel, select.spill_bytes) == ("select_blocks", 0)


@pytest.mark.parametrize("op", STATICS)
def test_compiles_to_warpgroup_products_without_a_gpu(op, tmp_path):
    w = workload(op)
    (space,) = (s for s in spaces_of(op, "forward") if s.algorithm == "warp_specialized")
    schedule = space.default_schedule(w, SM90)
    path = tmp_path / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    (resources,) = compile_variant(path, w, SM90)
    assert resources.matrix == "wgmma"
    assert not resources.problems(SM90)


FORCED = {"block_size": 64, "init_blocks": 1, "local_blocks": 2}


def kernels_of(w: Workload, algorithm: str, tmp_path: Path) -> dict[str, Resources]:
    """What each kernel of an algorithm's default schedule uses."""
    schedule = space_for(w, algorithm).default_schedule(w, SM90)
    path = tmp_path / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    found = {resources.kernel: resources for resources in compile_variant(path, w, SM90)}
    for resources in found.values():
        assert not resources.problems(SM90)
    return {"pipeline": found.pop(path.stem), **found}


@pytest.mark.parametrize(("group", "dim"), [(16, 128), (8, 64)])
def test_a_window_that_gives_the_forced_blocks(group: int, dim: int, tmp_path: Path) -> None:
    sizes = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": group, "window_size": 512}
    w = Workload.of("sliding_window_attention", "forward", dtype="bfloat16", **sizes, **FORCED)
    (pipeline,) = kernels_of(w, "forced_blocks", tmp_path).values()
    assert pipeline.matrix == "wgmma"


@pytest.mark.parametrize(
    ("group", "dim", "forced"),
    [
        (16, 128, True),
        pytest.param(16, 128, False, marks=pytest.mark.slow),
        pytest.param(8, 64, True, marks=pytest.mark.slow),
        (8, 64, False),
    ],
)
def test_tiles_of_unions_and_tokens_apart(
    group: int, dim: int, forced: bool, tmp_path: Path
) -> None:
    """Tokens of large unions run as query_major does: ten programs of a warp a multiprocessor."""
    sizes = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": group}
    blocks = FORCED if forced else {"block_size": 64}
    w = Workload.of("selected_attention", "forward", dtype="bfloat16", **sizes, **blocks)
    found = kernels_of(w, "union_tiles", tmp_path)
    assert set(found) == {"pipeline", "plan_unions", "attend_apart"}
    assert found["pipeline"].matrix == "wgmma"
    assert found["attend_apart"].matrix == "mma.sync"
    assert 65536 // (32 * found["attend_apart"].registers) >= 10


@pytest.mark.parametrize("op", STATICS)
@pytest.mark.parametrize(
    ("target", "changes", "covered"),
    [
        ("cuda:90", {}, True),
        ("cuda:90", {"group": 12}, False),
        ("cuda:90", {"dtype": "float32"}, False),
        ("cuda:90", {"dim": 80}, False),
        ("cuda:80", {}, False),
        ("cuda:100", {}, False),
    ],
)
def test_what_it_does_not_cover_is_left_to_plain_triton(op, target, changes, covered):
    spaces = spaces_for(workload(op, **changes), KNOWN_TARGETS[target])
    assert ("warp_specialized" in [s.algorithm for s in spaces]) == covered
    assert "row_tiles" in [s.algorithm for s in spaces]


@pytest.mark.parametrize(("group", "covered"), [(1, False), (2, False), (4, True), (64, True)])
@pytest.mark.parametrize("op", STATICS)
def test_gradients_of_groups_whose_statistics_no_bulk_copy_can_read(op, group, covered):
    """A copy that starts at a row of 4 or 8 bytes is an illegal instruction on a Hopper GPU."""
    spaces = spaces_for(workload(op, group, pass_="backward"), SM90)
    assert ("warp_specialized" in [s.algorithm for s in spaces]) == covered
    assert "two_passes" in [s.algorithm for s in spaces]


def selected_gradients(group: int, dtype: str = "bfloat16", dim: int = 128) -> Workload:
    params = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": group, "block_size": 64}
    return Workload.of("selected_attention", "backward", dtype=dtype, **params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group", [4, 8, 12, 16, 32, 64])
def test_selected_gradients_are_pipelined_for_groups_that_tile_a_step(group, dtype):
    """Triton's products read no tile of fewer than 8 rows."""
    algorithms = [s.algorithm for s in spaces_for(selected_gradients(group, dtype), SM90)]
    covered = group in (8, 16, 32, 64) and dtype != "float32"
    assert ("warp_specialized" in algorithms) == covered
    assert (algorithms[0] == "warp_specialized") == (covered and dtype == "bfloat16")
    assert "two_pass" in algorithms


@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("op", STATICS)
def test_gradients_compile_to_warpgroup_products_without_a_gpu(op, group, tmp_path):
    w = workload(op, group, pass_="backward")
    (space,) = (s for s in spaces_of(op, "backward") if s.algorithm == "warp_specialized")
    schedule = space.default_schedule(w, SM90)
    path = tmp_path / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    found = compile_variant(path, w, SM90)
    assert sum(one.matrix == "wgmma" for one in found) == 2
    for one in found:
        assert not one.problems(SM90)


def resources_of(w: Workload, folder: Path, changed: Callable[[Args], Args]) -> list[Resources]:
    """Of the kernels that a launch calls with the case's arguments as `changed` returns them."""
    (space,) = (s for s in spaces_of(w.op, w.pass_) if s.algorithm == "warp_specialized")
    schedule = space.default_schedule(w, SM90)
    path = folder / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    case = cases_of(w).make_case(w, Sizes((4096,), 4), "meta")
    case = Case(changed(case.args), case.outputs, case.expected, case.cost)
    calls = first_calls(all_launches(path, case))
    return [
        read_resources(call.kernel.__name__, compile_launch(call, SM90, path.stem), SM90)
        for call in calls
    ]


SHAPES = [(8, "bfloat16", 128), (16, "bfloat16", 128), (64, "bfloat16", 64), (16, "float16", 128)]


@pytest.mark.parametrize(
    ("group", "dtype", "dim", "gated"),
    [
        pytest.param(*shape, gated, marks=[] if i % 2 == gated else pytest.mark.slow)
        for i, shape in enumerate(SHAPES)
        for gated in (False, True)
    ],
)
def test_selected_gradients_use_no_stack(group, dtype, dim, gated, tmp_path):
    """Each group of warps holds one sum: there is room for all else that a step needs."""

    def with_gate(args: Args) -> Args:
        *first, _, lse, dq, dk, dv, scale = args
        return *first, None, lse, dq, dk, dv, scale, lse, torch.empty_like(lse)

    w = selected_gradients(group, dtype, dim)
    found = resources_of(w, tmp_path, with_gate if gated else lambda args: args)
    (pipeline,) = (one for one in found if one.matrix == "wgmma")
    assert pipeline.spill_bytes == 0
    assert not any(one.problems(SM90) for one in found)
    (space,) = (s for s in spaces_of(w.op, w.pass_) if s.algorithm == "warp_specialized")
    estimate = space.shared_memory(w, space.default_schedule(w, SM90))
    assert estimate - 1024 <= pipeline.shared_bytes <= estimate


def with_branches(args: Args) -> Args:
    o = args[4]
    gate = torch.empty((*o.shape[:2], 3), dtype=o.dtype, device="meta")
    return (*args, None, None, torch.empty_like(o), torch.empty_like(o), gate)


@pytest.mark.parametrize("group", [4, 16])
def test_the_gated_sum_in_the_epilogue_leaves_the_pipeline_as_it_is(group, tmp_path):
    w = workload("sliding_window_attention", group)
    (found,) = resources_of(w, tmp_path, with_branches)
    assert found.matrix == "wgmma"
    assert not found.problems(SM90)
    assert found.spill_bytes <= 8  # a word that is read before and after the loop


@pytest.mark.parametrize("op", STATICS)
def test_adding_gradients_takes_no_more_spills(op, tmp_path):
    params = {"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16}
    w = Workload.of(op, "backward", dtype="bfloat16", **params, **STATICS[op])

    def spills(add: bool) -> list[int]:
        def with_delta(args: Args) -> Args:
            *first, _, lse, dq, dk, dv, scale = args
            return *first, None, lse, dq, dk, dv, scale, lse, torch.empty_like(lse), add

        return [found.spill_bytes for found in resources_of(w, tmp_path, with_delta)]

    assert spills(add=True) == spills(add=False)
