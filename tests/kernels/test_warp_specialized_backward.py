"""The Hopper pipelines of the backward passes against the gradients of the float64 reference.

Gluon has no interpreter: these run on a Hopper GPU only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Case, Sizes, cases_of, relative_error
from nsagen.codegen.template import space_for, spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.kernels import test_ranges as ranges
from tests.support import check_case, is_hopper, load_kernel

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")

SM90 = KNOWN_TARGETS["cuda:90"]
STATICS: dict[str, dict[str, Any]] = {
    "compressed_attention": {"kernel_size": 8, "kernel_stride": 4},
    "selected_attention": {"block_size": 64},
    "sliding_window_attention": {"window_size": 100},
}
RAGGED = (0, 700, 31, 1, 1033, 7)  # empty, longer than steps, shorter than a window

each_op = pytest.mark.parametrize("op", STATICS)
each_pipeline = pytest.mark.parametrize("op", ["compressed_attention", "sliding_window_attention"])


def workload(
    op: str, dtype: str = "bfloat16", dim: int = 128, group: int = 16, **statics: Any
) -> Workload:
    params = {"head_dim": dim, "v_head_dim": dim, "gqa_ratio": group}
    return Workload.of(op, "backward", dtype=dtype, **(params | STATICS[op] | statics))


def schedule_of(w: Workload, **knobs: Any) -> Schedule:
    (space,) = (s for s in spaces_of(w.op, "backward") if s.algorithm == "warp_specialized")
    return Schedule.of(space.algorithm, {**space.default(w, SM90), **knobs})


def case_of(w: Workload, seqlens: tuple[int, ...] = RAGGED, kv_heads: int = 2) -> Case:
    return cases_of(w).make_case(w, Sizes(seqlens, kv_heads), "cuda", seed=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [4, 8, 16, 32, 64])
@each_op
def test_group_sizes(op: str, group: int, dtype: str) -> None:
    if op == "selected_attention" and group < 8:
        pytest.skip("smaller groups take plain kernels")
    w = workload(op, dtype, group=group)
    check_case(load_kernel(w, schedule_of(w)), case_of(w))


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("knobs", [{"block_n": 64, "num_stages": 4}, {"row_stages": 2}], ids=str)
@each_pipeline
def test_head_sizes_and_schedules(op: str, knobs: dict[str, int], dim: int, v_dim: int) -> None:
    w = workload(op, dim=dim, v_head_dim=v_dim)
    check_case(load_kernel(w, schedule_of(w, **knobs)), case_of(w))


@pytest.mark.parametrize(
    ("group", "dtype", "dim", "v_dim"),
    [
        *((group, "bfloat16", 128, 128) for group in (4, 8, 16, 32, 64)),
        *((16, "float16", *dims) for dims in ((128, 128), (64, 128), (128, 64), (64, 64))),
    ],
)
@pytest.mark.parametrize("hide", ["gradients", "scores"])
def test_stored_ds(group: int, dtype: str, dim: int, v_dim: int, hide: str) -> None:
    """In one range of tokens, and in several."""
    w = workload("compressed_attention", dtype, dim, group, v_head_dim=v_dim)
    default = space_for(w, "stored_ds").default_schedule(w, SM90)
    module = load_kernel(w, Schedule.of("stored_ds", dict(default.knobs), hide=hide))
    check_case(module, case_of(w))
    module.WORKSPACE = 1  # as few tokens as there can be
    check_case(module, case_of(w))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [4, 8, 16])
@each_pipeline
def test_scores_that_are_hidden_before_their_exponents(op: str, group: int, dtype: str) -> None:
    w = workload(op, dtype, group=group)
    check_case(load_kernel(w, schedule_of(w, hide="scores")), case_of(w))


@pytest.mark.parametrize("knobs", [{"row_stages": 2}, {"part_tokens": 16, "shares": 64}], ids=str)
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_selected_schedules(dtype: str, dim: int, v_dim: int, knobs: dict[str, int]) -> None:
    """Lists of many parts; at 64 MiB also several ranges of tokens."""
    w = workload("selected_attention", dtype, dim, v_head_dim=v_dim)
    check_case(load_kernel(w, schedule_of(w, **knobs)), case_of(w, (3000, 77)))


@pytest.mark.parametrize(
    ("op", "forward", "algorithm"),
    [
        ("compressed_attention", "row_tiles", "warp_specialized"),
        ("compressed_attention", "row_tiles", "stored_ds"),
        ("selected_attention", "query_major", "warp_specialized"),
        ("sliding_window_attention", "row_tiles", "warp_specialized"),
    ],
)
def test_float16_ds_of_a_loss_scaled_by_2_to_the_15(
    op: str, forward: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ranges.STATICS, "selected_attention", {"block_size": 64})
    ranges.check_large_ds(op, forward, algorithm)


@pytest.mark.parametrize("block_size", [128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_selected_blocks_of_several_tiles(dtype: str, block_size: int) -> None:
    w = workload("selected_attention", dtype, block_size=block_size)
    check_case(load_kernel(w, schedule_of(w)), case_of(w, (3000, 77, 130)))


@pytest.mark.parametrize("group", [8, 64])
def test_selected_blocks_named_twice_out_of_order_or_in_the_future(group: int) -> None:
    """topk_idx is a set: what does not count has no gradient, and a repeat counts once."""
    w = workload("selected_attention", group=group)
    random = torch.Generator().manual_seed(0)
    topk_idx = torch.randint(-2, 12, (2, 700, 9), generator=random)
    topk_idx[:, 100:110] = -1  # rows that see nothing
    case = cases_of(w).make_case(w, Sizes((650, 50), 2), "cuda", seed=1, topk_idx=topk_idx)
    check_case(load_kernel(w, schedule_of(w)), case)
    assert case.outputs["dq"][100:110].count_nonzero() == 0


def test_selected_shares_that_float16_cannot_hold() -> None:
    """A block's share of dq reaches 1e5 in one column, where their sum is about 0."""
    w = workload("selected_attention", "float16")
    case = case_of(w, (1000,))
    do, q, k, v, topk_idx, cu_seqlens, o, lse, *_ = case.args
    do *= 2.0**6
    q[..., 0], k[..., 0] = 0.0, 2.0**8
    exact = reference.selected_attention(
        *(x.double() for x in (q, k, v)), topk_idx, cu_seqlens, block_size=64
    )
    for given, right in zip((o, lse), exact, strict=True):
        given.copy_(right)
    load_kernel(w, schedule_of(w)).launch(*case.args)
    dq, right = case.outputs["dq"], case.expected()["dq"]
    assert dq.isfinite().all()
    assert relative_error(dq[..., 1:], right[..., 1:]) <= THRESHOLDS[torch.float16]


@pytest.mark.parametrize("part_tokens", [16, 64, 4096])
def test_ranges_in_which_a_block_has_no_part_one_or_many(
    part_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that no token selects, none of the first range, none of the last, and every token."""
    w = workload("selected_attention")
    token = torch.arange(1500)
    own = token // 64
    rare = torch.where((token > 700) & (token < 760), 3, -1)  # block 3 in the middle only
    late = torch.where(token > 1400, 5, -1)
    topk_idx = torch.stack([torch.zeros_like(token), torch.where(own > 9, own, -1), rare, late], 1)
    case = cases_of(w).make_case(
        w, Sizes((1500,), 1), "cuda", seed=1, topk_idx=topk_idx[None].contiguous()
    )
    module = load_kernel(w, schedule_of(w, part_tokens=part_tokens))
    for limit in (1, 400 * 4 * 16 * 128 * 2, 1 << 30):  # tokens of one chunk, a quarter, all
        monkeypatch.setattr(module, "SHARES_BYTES", limit)
        for out in case.outputs.values():
            out.fill_(float("nan"))
        check_case(module, case)


@pytest.mark.parametrize("window", [1, 2, 64, 127, 128, 129, 5000])
def test_windows_of_any_size(window: int) -> None:
    w = workload("sliding_window_attention", group=4, window_size=window)
    check_case(load_kernel(w, schedule_of(w)), case_of(w))


@pytest.mark.parametrize(("size", "stride"), [(32, 16), (16, 16), (128, 8), (1, 1)])
def test_windows_that_overlap_or_not(size: int, stride: int) -> None:
    w = workload("compressed_attention", kernel_size=size, kernel_stride=stride)
    check_case(load_kernel(w, schedule_of(w)), case_of(w))


@each_op
def test_one_long_and_many_short_sequences(op: str) -> None:
    w = workload(op)
    check_case(load_kernel(w, schedule_of(w)), case_of(w, (1, 0, 3, 4000, *range(40)), kv_heads=1))


@each_op
def test_views_of_any_alignment(op: str) -> None:
    """do, q and k as slices of wider tensors, and rows that bulk copies cannot read."""
    w = workload(op, group=8)
    case = case_of(w)
    do, q, k, *rest = case.args
    assert isinstance(do, torch.Tensor)
    assert isinstance(q, torch.Tensor)
    assert isinstance(k, torch.Tensor)
    wide = torch.nn.functional.pad(q, (0, 4))[..., :-4]  # rows of 132 elements
    packed = torch.cat([q, do], 1)
    q_of_packed, do_of_packed = packed.split([q.shape[1], do.shape[1]], 1)
    k_by_head = k.transpose(0, 1).contiguous().transpose(0, 1)
    module = load_kernel(w, schedule_of(w))
    for views in ((do, wide, k), (do_of_packed, q_of_packed, k_by_head)):
        check_case(module, Case((*views, *rest), case.outputs, case.expected, case.cost))


@each_op
def test_a_gradient_that_is_the_same_for_all_tokens(op: str) -> None:
    w = workload(op)
    case = case_of(w)
    do, *rest = case.args
    assert isinstance(do, torch.Tensor)
    same = do[:1, :1].expand_as(do)
    do.copy_(same.clone())
    module = load_kernel(w, schedule_of(w))
    check_case(
        module,
        Case((do[:1, :1].clone().expand_as(do), *rest), case.outputs, case.expected, case.cost),
    )


@each_op
def test_the_same_bits_every_time(op: str) -> None:
    w = workload(op)
    case = case_of(w, (3000, 17))
    module = load_kernel(w, schedule_of(w))
    module.launch(*case.args)
    first = {name: out.clone() for name, out in case.outputs.items()}
    for _ in range(20):
        module.launch(*case.args)
        assert all(torch.equal(out, first[name]) for name, out in case.outputs.items())


@each_op
def test_sequences_do_not_read_each_other(op: str) -> None:
    """NaN in the other sequences reaches none of this one's gradients."""
    w = workload(op)
    case = case_of(w, (200, 411, 300))
    expected = case.expected()
    do, q, k, v, *rest = case.args
    offsets = [x for x in rest if isinstance(x, torch.Tensor) and x.shape == (4,)]
    for places, tensors in ((offsets[0], (do, q)), (offsets[-1], (k, v))):
        begin, end = places[1:3].tolist()
        for x in tensors:
            assert isinstance(x, torch.Tensor)
            x[:begin] = float("nan")
            x[end:] = float("nan")
    load_kernel(w, schedule_of(w)).launch(*case.args)
    for name, places in (("dq", offsets[0]), ("dk", offsets[-1]), ("dv", offsets[-1])):
        ours = slice(*places[1:3].tolist())
        came, right = case.outputs[name][ours].double(), expected[name][ours]
        assert (came - right).norm() <= 1e-2 * right.norm(), name
