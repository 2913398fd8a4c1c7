"""What the defaults of attention's tiles compile to on Hopper, with no GPU present."""

import pytest

from nsagen.aot.compile import compile_launch, compile_variant, recorded_launches
from nsagen.codegen.template import default_schedule, kernel_name, render, spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Workload

SM90 = KNOWN_TARGETS["cuda:90"]
STATICS = {
    "compressed_attention": {"kernel_size": 32, "kernel_stride": 16},
    "sliding_window_attention": {"window_size": 512},
}


def written(op, pass_, algorithm, folder):
    """The workload of the paper's shape, and the file of its kernel with the default schedule."""
    sizes = {"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16}
    w = Workload.of(op, pass_, dtype="bfloat16", **sizes, **STATICS[op])
    (space,) = (s for s in spaces_of(op, pass_) if s.algorithm == algorithm)
    schedule = space.default_schedule(w, SM90)
    path = folder / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    return w, path


@pytest.mark.parametrize("op", STATICS)
def test_descriptors_become_bulk_copies_into_shared_memory(op, tmp_path):
    w, path = written(op, "forward", "row_tiles", tmp_path)
    (call,) = recorded_launches(path, w)
    ptx = compile_launch(call, SM90, path.stem).asm["ptx"]
    assert "cp.async.bulk.tensor" in ptx
    assert "wgmma.mma_async" in ptx


@pytest.mark.parametrize("op", STATICS)
def test_gradients_use_warpgroup_products_and_spill_nothing(op, tmp_path):
    w, path = written(op, "backward", "two_passes", tmp_path)
    for resources in compile_variant(path, w, SM90):
        assert resources.matrix == ("none" if resources.kernel.endswith("_add") else "wgmma")
        assert not resources.problems(SM90, measured=True)
        assert resources.loop_spills == 0


def test_the_pipelined_gradients_of_a_band_keep_no_stack_in_loops(tmp_path):
    """MiniCPM4's, by compilation: three stages of rows did with Triton 3.6, whose quotients by a
    number that is no power of two take registers."""
    sizes = {"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16}
    window = {"window_size": 33 * 64, "block_size": 64}
    w = Workload.of("sliding_window_attention", "backward", dtype="bfloat16", **sizes, **window)
    schedule = default_schedule(w, SM90)
    path = tmp_path / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    assert schedule.algorithm == "warp_specialized"
    for resources in compile_variant(path, w, SM90):
        assert not resources.problems(SM90)
