"""The Hopper pipelines compile anywhere, to warpgroup products and without spills to mention."""

import pytest

from nsagen.codegen.compile import compile_variant
from nsagen.codegen.target import KNOWN_TARGETS
from nsagen.codegen.template import default_schedule, kernel_name, render, spaces_for, spaces_of
from nsagen.workload import Workload

SM90 = KNOWN_TARGETS["cuda:90"]
STATICS = {
    "compressed_attention": {"kernel_size": 32, "kernel_stride": 16},
    "sliding_window_attention": {"window_size": 512},
}


def workload(op: str, group: int = 16, dtype: str = "bfloat16", dim: int = 128) -> Workload:
    params = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": group}
    return Workload.of(op, "forward", dtype=dtype, **params, **STATICS[op])


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


@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("op", [*STATICS, "selected_attention"])
def test_gradients_compile_to_warpgroup_products_without_a_gpu(op, group, tmp_path):
    statics = STATICS.get(op, {"block_size": 64})
    w = Workload.of(
        *(op, "backward"),
        **{"dtype": "bfloat16", "head_dim": 128, "v_head_dim": 128, "gqa_ratio": group, **statics},
    )
    schedule = default_schedule(w, SM90)
    assert schedule.algorithm == "warp_specialized"
    path = tmp_path / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    found = compile_variant(path, w, SM90)
    assert sum(one.matrix == "wgmma" for one in found) == (1 if op == "selected_attention" else 2)
    for one in found:
        assert not one.problems(SM90)
