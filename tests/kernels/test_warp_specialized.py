"""The Hopper pipelines of compressed and sliding-window attention against the float64 reference.

Gluon has no interpreter: these run on a Hopper GPU only.
"""

import pytest
import torch

from nsagen.codegen.target import KNOWN_TARGETS
from nsagen.codegen.template import spaces_of
from nsagen.harness.base import Case, Sizes, harness_of
from nsagen.workload import Schedule, Workload
from tests.support import check_case, load_kernel

SM90 = KNOWN_TARGETS["cuda:90"]
STATICS = {
    "compressed_attention": {"kernel_size": 8, "kernel_stride": 4},
    "sliding_window_attention": {"window_size": 100},
}
RAGGED = (0, 700, 31, 1, 1033, 7)  # empty, longer than steps, shorter than a window

each_op = pytest.mark.parametrize("op", STATICS)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


def workload(op, dtype="bfloat16", dim=128, v_dim=None, group=16, **statics):
    params = {"head_dim": dim, "v_head_dim": v_dim or dim, "gqa_ratio": group}
    return Workload.of(op, "forward", dtype=dtype, **params, **(STATICS[op] | statics))


def schedule_of(w: Workload, **knobs) -> Schedule:
    (space,) = (s for s in spaces_of(w.op, "forward") if s.algorithm == "warp_specialized")
    return Schedule.of(space.algorithm, {**space.default(w, SM90), **knobs})


def case_of(w: Workload, seqlens=RAGGED, kv_heads=2) -> Case:
    return harness_of(w).make_case(w, Sizes(seqlens, kv_heads), "cuda", seed=1)


@on_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32, 64])
@each_op
def test_group_sizes(op, group, dtype):
    w = workload(op, dtype, group=group)
    check_case(load_kernel(w, schedule_of(w)), case_of(w))


@on_hopper
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("knobs", [{"block_n": 64, "num_stages": 2}, {"block_n": 128}])
@each_op
def test_head_sizes_and_schedules(op, knobs, dim, v_dim):
    w = workload(op, dim=dim, v_dim=v_dim)
    check_case(load_kernel(w, schedule_of(w, **{"num_stages": 2, **knobs})), case_of(w))


@on_hopper
@pytest.mark.parametrize("window", [1, 2, 64, 127, 128, 129, 5000])
def test_windows_of_any_size(window):
    w = workload("sliding_window_attention", group=4, window_size=window)
    check_case(load_kernel(w, schedule_of(w)), case_of(w))


@on_hopper
@pytest.mark.parametrize(("size", "stride"), [(32, 16), (16, 16), (128, 8), (1, 1)])
def test_windows_that_overlap_or_not(size, stride):
    w = workload("compressed_attention", kernel_size=size, kernel_stride=stride)
    check_case(load_kernel(w, schedule_of(w)), case_of(w))


@on_hopper
@each_op
def test_one_long_and_many_short_sequences(op):
    w = workload(op)
    check_case(load_kernel(w, schedule_of(w)), case_of(w, (1, 0, 3, 4000, *range(40)), kv_heads=1))


@on_hopper
@each_op
def test_views_of_any_alignment(op):
    """q, k and v as slices of a projection, and rows that bulk copies cannot read."""
    w = workload(op, group=2)
    case = case_of(w)
    q, k, v, *rest = case.args
    wide = torch.nn.functional.pad(q, (0, 4))[..., :-4]  # rows of 132 elements
    q_of_packed = torch.cat([q, q], 1)[:, q.shape[1] :]
    k_by_head = k.transpose(0, 1).contiguous().transpose(0, 1)
    module = load_kernel(w, schedule_of(w))
    for views in ((wide, k, v), (q_of_packed, k_by_head, v)):
        check_case(module, Case((*views, *rest), case.outputs, case.expected, case.cost))


@on_hopper
@each_op
def test_the_same_bits_every_time(op):
    w = workload(op)
    case = case_of(w, (3000, 17))
    module = load_kernel(w, schedule_of(w))
    module.launch(*case.args)
    first = case.outputs["o"].clone()
    for _ in range(20):
        module.launch(*case.args)
        assert torch.equal(case.outputs["o"], first)
