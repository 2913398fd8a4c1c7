"""Sliding-window attention's forward kernel against the float64 reference."""

from types import ModuleType

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Case, Sizes, cu_seqlens_of, relative_error
from nsagen.cases.sliding_window_attention import make_case
from nsagen.codegen.template import space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 3, 60, 1, 17)  # empty, shorter than the window, longer


def workload(dtype="float32", dim=32, v_dim=None, group=2, window=40):
    return Workload.of(
        "sliding_window_attention",
        "forward",
        dtype=dtype,
        head_dim=dim,
        v_head_dim=v_dim or dim,
        gqa_ratio=group,
        window_size=window,
    )


def case_of(w: Workload, seqlens=RAGGED, kv_heads=2) -> Case:
    return make_case(w, Sizes(seqlens, kv_heads), kernel_device(), seed=1)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("group", [1, 2, 3, 16])
def test_group_sizes(dtype, group):
    w = workload(dtype, group=group)
    check_case(row_tiles(w), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (64, 64), (128, 128), (24, 80), (192, 128)])
def test_head_sizes(dtype, dim, v_dim):
    w = workload(dtype, dim, v_dim)
    check_case(row_tiles(w), case_of(w, (33, 0, 50)))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 200, 1000])
def test_windows_of_any_size(window):
    w = workload("float16", window=window)
    check_case(row_tiles(w), case_of(w, (250,), kv_heads=1))


def row_tiles(w: Workload) -> ModuleType:
    """Plain Triton's kernel with its own default schedule; Gluon's has no interpreter."""
    knobs = space_for(w, "row_tiles").default(w, KNOWN_TARGETS["cuda:90"])
    return load_kernel(w, Schedule.of("row_tiles", knobs))


def schedule_of(**knobs) -> Schedule:
    return Schedule.of("row_tiles", {"num_warps": 1, "num_stages": 2, "loads": "pointers", **knobs})


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (128, 32)])
@pytest.mark.parametrize("window", [7, 100])
def test_schedules(loads, group, block_m, block_n, window):
    """Every way in which a window splits into steps: with and without whole ones."""
    w = workload("float16", group=group, window=window)
    schedule = schedule_of(block_m=block_m, block_n=block_n, loads=loads)
    check_case(load_kernel(w, schedule), case_of(w, (110, 20), kv_heads=1))


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize("group", [2, 3])
def test_chunks_of_longer_prompts(loads, group):
    """Queries that begin in mid-sequence, and keys that begin before them."""
    w = workload("float16", group=group)
    kernel = load_kernel(w, schedule_of(block_m=32, block_n=16, loads=loads))
    whole = case_of(w, (90, 0, 12, 61))
    q, k, v, cu_seqlens, o, lse, scale = whole.args
    starts, lengths = (70, 0, 0, 33), (20, 0, 12, 20)
    device, begins = q.device, cu_seqlens.tolist()
    rows = [range(b + s, b + s + n) for b, s, n in zip(begins, starts, lengths, strict=False)]
    picked = torch.tensor([row for part in rows for row in part], device=device)
    q_start = torch.tensor(starts, dtype=torch.int32, device=device)
    kernel.launch(
        q[picked],
        k,
        v,
        cu_seqlens_of(lengths, device),
        o[: len(picked)],
        lse[: len(picked)],
        scale,
        cu_seqlens,
        q_start,
    )
    for name, expected in whole.expected().items():
        error = relative_error(whole.outputs[name][: len(picked)], expected[picked])
        assert error <= THRESHOLDS[whole.outputs[name].dtype], name


def test_keys_that_end_before_their_queries():
    """A query whose window holds no key gives 0 and -inf."""
    w = workload("float32", group=1, window=5)
    q, k, v, cu_seqlens, o, lse, scale = case_of(w, (12,), kv_heads=1).args
    few = torch.tensor([0, 3], dtype=torch.int32, device=q.device)
    row_tiles(w).launch(q, k[:3], v[:3], cu_seqlens, o, lse, scale, few, None)
    expected = reference.sliding_window_attention_forward(
        *(x.double() for x in (q, k[:3], v[:3])), cu_seqlens, window_size=5, cu_seqlens_k=few
    )
    assert relative_error(o, expected[0]) <= 1e-5
    assert relative_error(lse, expected[1]) <= 1e-5
    assert lse.isneginf().sum() == 5


def with_branches(case: Case, gate_dtype: torch.dtype | None = None, more: tuple = (None, None)):
    """The case whose o is the gated sum with two random branches; gates of both signs, and 0."""
    o = case.outputs["o"]
    torch.manual_seed(2)
    branches = [torch.randn(o.shape).to(o) for _ in range(2)]
    gate = torch.randn(*o.shape[:2], 3).to(o.device, gate_dtype or o.dtype)
    gate[::3, ::2] = 0.0

    def expected() -> dict[str, torch.Tensor]:
        right = case.expected()
        wide = [x.double() for x in (*branches, right["o"], gate)]
        return {**right, "o": reference.gated_sum(*wide)}

    args = (*case.args, *more, *branches, gate)
    return Case(args, case.outputs, expected, case.cost)


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("dim", "v_dim", "group"), [(64, 64, 4), (24, 80, 3), (32, 16, 1)])
def test_the_gated_sum_with_other_branches(loads, dtype, dim, v_dim, group):
    w = workload(dtype, dim, v_dim, group)
    kernel = load_kernel(w, schedule_of(block_m=32, block_n=16, loads=loads))
    check_case(kernel, with_branches(case_of(w)))
    check_case(kernel, with_branches(case_of(w), torch.float32))


def test_the_gated_sum_where_no_key_is_seen():
    """There the window's share is 0 and the others' stay."""
    w = workload("float32", group=1, window=5)
    case = case_of(w, (12,), kv_heads=1)
    few = torch.tensor([0, 3], dtype=torch.int32, device=kernel_device())
    *args, _, _, one, two, gate = with_branches(case).args
    args[1], args[2] = (x[:3] for x in args[1:3])
    row_tiles(w).launch(*args, few, None, one, two, gate)
    rest = gate[7:, :, :1] * one[7:] + gate[7:, :, 1:2] * two[7:]
    torch.testing.assert_close(case.outputs["o"][7:], rest)


def test_branches_that_do_not_fit_are_refused():
    w = workload()
    *args, one, two, gate = with_branches(case_of(w)).args
    launch = row_tiles(w).launch
    with pytest.raises(ValueError, match="must come together; got 2 of 3"):
        launch(*args, one, None, gate)
    with pytest.raises(ValueError, match="as o is, and gate"):
        launch(*args, one, two[1:], gate)
    with pytest.raises(ValueError, match="as o is, and gate"):
        launch(*args, one, two, gate[..., :2])
    with pytest.raises(ValueError, match="gate must be contiguous"):
        launch(*args, one, two.transpose(0, 1).contiguous().transpose(0, 1), gate)


def test_descriptors_over_views_that_bulk_copies_cannot_read():
    """Keys at an odd address and with odd strides are copied first."""
    w = workload("float16")
    case = case_of(w, (50, 21))
    q, k, v, *rest = case.args
    odd = torch.zeros(k.numel() + 1, dtype=k.dtype, device=k.device)[1:].view(k.shape)
    wide = torch.zeros((*v.shape[:2], v.shape[2] + 1), dtype=v.dtype, device=v.device)
    odd.copy_(k)
    wide[..., :-1] = v
    kernel = load_kernel(w, schedule_of(block_m=32, block_n=16, loads="descriptors"))
    views = Case((q, odd, wide[..., :-1], *rest), case.outputs, case.expected, case.cost)
    check_case(kernel, views)


def test_a_query_sees_exactly_its_window():
    """With values that name their token, equal scores average the tokens of the window."""
    w = workload(window=5, group=1, dim=16)
    q, k, v, cu_seqlens, o, lse, scale = case_of(w, (40,), kv_heads=1).args
    q.zero_()
    v.copy_(torch.arange(40.0)[:, None, None].expand_as(v))
    row_tiles(w).launch(q, k, v, cu_seqlens, o, lse, scale)
    seen = [range(max(0, t - 4), t + 1) for t in range(40)]
    means = torch.tensor([sum(tokens) / len(tokens) for tokens in seen])
    counts = torch.tensor([float(len(tokens)) for tokens in seen])
    torch.testing.assert_close(o[:, 0, 0].cpu(), means)
    torch.testing.assert_close(lse[:, 0].cpu().exp(), counts)


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_views_with_any_token_and_head_strides(dtype):
    """q, k and v as slices of one projection, and k with heads outside tokens."""
    w = workload(dtype, group=3)
    case = case_of(w)
    q, k, v, *rest = case.args
    packed = torch.cat([q, k, v], 1)
    q = packed[:, : q.shape[1]]
    v = packed[:, -v.shape[1] :]
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    check_case(row_tiles(w), Case((q, k, v, *rest), case.outputs, case.expected, case.cost))


@pytest.mark.parametrize("magnitude", [0.0, 1e3])
def test_equal_and_huge_scores(magnitude):
    w = workload("float32")
    case = case_of(w)
    case.args[0].mul_(magnitude)
    check_case(row_tiles(w), case)


def test_nothing_to_do():
    w = workload()
    for seqlens in ((), (0,), (0, 0, 0)):
        row_tiles(w).launch(*case_of(w, seqlens).args)


def test_a_wrong_call_is_refused():
    w = workload()
    q, k, v, cu_seqlens, o, lse, scale = case_of(w).args
    launch = row_tiles(w).launch
    with pytest.raises(ValueError, match="gqa_ratio 2"):
        launch(q[:, :3], k, v, cu_seqlens, o, lse, scale)
    with pytest.raises(ValueError, match="last dimension"):
        launch(q, k.transpose(0, 2).contiguous().transpose(0, 2), v, cu_seqlens, o, lse, scale)
    with pytest.raises(ValueError, match="softmax_scale must be positive"):
        launch(q, k, v, cu_seqlens, o, lse, -scale)
