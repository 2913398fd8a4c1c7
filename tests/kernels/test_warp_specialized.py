"""The Hopper pipelines of compressed and sliding-window attention against the float64 reference.

Gluon has no interpreter: these run on a Hopper GPU only.
"""

import pytest
import torch

from nsagen.cases.base import Case, Sizes, cases_of
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, load_kernel

from .test_sliding_window_attention import with_branches

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
    return cases_of(w).make_case(w, Sizes(seqlens, kv_heads), "cuda", seed=1)


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
    check_case(load_kernel(w, schedule_of(w, **knobs)), case_of(w))


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


@on_hopper
@pytest.mark.parametrize("gate_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (128, 64), (64, 128)])
@pytest.mark.parametrize("group", [1, 4, 16, 64])
def test_the_gated_sum_with_other_branches(group, dim, v_dim, gate_dtype):
    w = workload("sliding_window_attention", dim=dim, v_dim=v_dim, group=group)
    for knobs in ({}, {"block_n": 128, "num_stages": 2}):
        kernel = load_kernel(w, schedule_of(w, **knobs))
        check_case(kernel, with_branches(case_of(w), gate_dtype))


@on_hopper
def test_the_gated_sum_has_the_same_bits_every_time():
    w = workload("sliding_window_attention")
    case = with_branches(case_of(w, (3000, 17)))
    module = load_kernel(w, schedule_of(w))
    module.launch(*case.args)
    first = case.outputs["o"].clone()
    for _ in range(20):
        module.launch(*case.args)
        assert torch.equal(case.outputs["o"], first)


def selection(group=16, dtype="bfloat16", dim=128, **statics) -> Workload:
    params = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64}
    params |= {"topk": 8, "init_blocks": 1, "local_blocks": 2, "gqa_ratio": group}
    names = params | statics
    return Workload.of("block_selection", "forward", dtype=dtype, head_dim=dim, **names)


@on_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32, 64])
def test_selection_for_group_sizes(group, dtype):
    w = selection(group, dtype, kernel_size=8, kernel_stride=4, block_size=16)
    check_case(load_kernel(w, schedule_of(w)), case_of(w))


@on_hopper
@pytest.mark.parametrize("knobs", [{"num_stages": 2}, {"num_stages": 3, "workspace": 32}], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_selection_for_schedules(dim, knobs):
    w = selection(16, dim=dim)
    check_case(load_kernel(w, schedule_of(w, **knobs)), case_of(w, (0, 3100, 31, 1, 1033, 7)))


@on_hopper
@pytest.mark.parametrize(
    "statics",
    [
        {"kernel_size": 128, "kernel_stride": 8},  # windows that reach over several blocks
        {"kernel_size": 16, "kernel_stride": 16},  # windows that do not overlap
        {"block_size": 16},  # a window a block
        {"block_size": 1024},  # 64 windows a block
        {"topk": 1, "init_blocks": 0, "local_blocks": 1},
        {"topk": 64},
        {"topk": 3, "init_blocks": 1, "local_blocks": 2},  # all forced
        {"dim": 64, "init_blocks": 0, "local_blocks": 0},
    ],
    ids=str,
)
def test_selection_for_windows_and_blocks(statics):
    w = selection(4, **statics)
    check_case(load_kernel(w, schedule_of(w)), case_of(w, (0, 3100, 31, 1, 1033, 7)))


@on_hopper
def test_selection_in_several_workspaces_and_more_blocks_than_are_looked_at_at_once():
    w = selection(16, kernel_size=8, kernel_stride=4, block_size=8)
    schedule = schedule_of(w, workspace=32)
    check_case(load_kernel(w, schedule), case_of(w, (3, 20_000, 500), kv_heads=1))


@on_hopper
def test_equal_scores_take_the_lowest_blocks():
    w = selection(16, topk=8)
    case = case_of(w, (4000, 77))
    case.args[0].zero_()  # q
    launch = load_kernel(w, schedule_of(w)).launch
    lse = case.args[2]
    lse.copy_(torch.where(torch.isinf(lse), lse, 5.0))
    launch(*case.args)
    # The first block has one window less in it than the others; the forced ones are 0, 61 and 62.
    assert case.outputs["topk_idx"][0, 3999].tolist() == [0, 1, 2, 3, 4, 5, 61, 62]


@on_hopper
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_odd_numbers_neither_hang_nor_leave_the_row(odd):
    w = selection(16, topk=8)
    case = case_of(w, (3000,))
    case.args[0][::7] = odd
    load_kernel(w, schedule_of(w)).launch(*case.args)
    topk_idx = case.outputs["topk_idx"]
    assert ((topk_idx >= -1) & (topk_idx < 47)).all()
    assert (topk_idx[:, -1, :1] == 0).all()


@on_hopper
def test_selection_for_a_chunk_is_that_of_the_whole():
    w = selection(4)
    case = case_of(w, (3000, 200))
    q, k, lse, _, cu_seqlens_k, topk_idx, scale = case.args
    launch = load_kernel(w, schedule_of(w)).launch
    launch(*case.args)
    rows = torch.cat([torch.arange(1000, 3000), torch.arange(3150, 3200)]).to(q.device)
    chunk = torch.full_like(topk_idx[:, rows], -7)
    offsets = torch.tensor([0, 2000, 2050], dtype=torch.int32, device=q.device)
    starts = torch.tensor([1000, 150], dtype=torch.int32, device=q.device)
    launch(q[rows], k, lse[rows], offsets, cu_seqlens_k, chunk, scale, starts)
    assert torch.equal(chunk, topk_idx[:, rows])
