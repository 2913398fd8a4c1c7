"""Sliding-window attention's backward kernels against the gradients of the float64 reference."""

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.sliding_window_attention_backward import make_case
from nsagen.codegen.template import space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 3, 60, 1, 17)  # empty, shorter than the window, longer


def workload(dtype="float16", dim=32, v_dim=None, group=2, window=40):
    return Workload.of(
        "sliding_window_attention",
        "backward",
        dtype=dtype,
        head_dim=dim,
        v_head_dim=v_dim or dim,
        gqa_ratio=group,
        window_size=window,
    )


def case_of(w: Workload, seqlens=RAGGED, kv_heads=2) -> Case:
    return make_case(w, Sizes(seqlens, kv_heads), kernel_device(), seed=1)


def schedule_of(w: Workload, **knobs) -> Schedule:
    default = space_for(w).default(w, KNOWN_TARGETS["cuda:90"])
    return Schedule.of("two_passes", {**default, **knobs})


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 16])
def test_group_sizes(dtype, group):
    w = workload(dtype, group=group)
    check_case(load_kernel(w), case_of(w, kv_heads=1))


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (24, 80), (80, 80), (192, 128)])
def test_head_sizes(dim, v_dim):
    w = workload(dim=dim, v_dim=v_dim)
    check_case(load_kernel(w), case_of(w, (33, 0, 50)))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 200, 1000])
def test_windows_of_any_size(window):
    w = workload(window=window)
    check_case(load_kernel(w), case_of(w, (210,), kv_heads=1))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("key_tile", "row_step", "block_m", "block_n"),
    [(16, 16, 16, 64), (16, 64, 64, 16), (64, 16, 32, 32), (128, 32, 128, 16)],
)
@pytest.mark.parametrize("window", [7, 100])
def test_schedules(group, key_tile, row_step, block_m, block_n, window):
    """Every way in which a window splits into steps, in both passes."""
    w = workload(group=group, window=window)
    sides = {"key_tile": key_tile, "row_step": row_step, "block_m": block_m, "block_n": block_n}
    check_case(load_kernel(w, schedule_of(w, **sides)), case_of(w, (110, 20), kv_heads=1))


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_views_with_any_token_and_head_strides(dtype):
    """do, q, k and v as slices of wider tensors, and k with heads outside tokens."""
    w = workload(dtype, group=3)
    case = case_of(w)
    do, q, k, v, *rest = case.args
    packed = torch.cat([q, do, k, v], 1)
    q, do = packed[:, : q.shape[1]], packed[:, q.shape[1] : q.shape[1] + do.shape[1]]
    v = packed[:, -v.shape[1] :]
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    check_case(load_kernel(w), Case((do, q, k, v, *rest), case.outputs, case.expected, case.cost))


def test_sequences_do_not_read_each_other():
    """NaN in the other sequences reaches none of this one's gradients."""
    w = workload("float32")
    case = case_of(w, (20, 21, 5))
    expected = case.expected()
    for x in case.args[:4]:  # do, q, k and v
        x[:20] = float("nan")
        x[41:] = float("nan")
    load_kernel(w).launch(*case.args)
    for name, out in case.outputs.items():
        torch.testing.assert_close(out[20:41].double(), expected[name][20:41], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("magnitude", [0.0, 30.0])
def test_equal_and_huge_scores(magnitude):
    """Scores of hundreds: probabilities of hidden keys, were they taken, would be infinite."""
    w = workload("float32")
    drawn = case_of(w)
    drawn.args[1].mul_(magnitude)
    _, q, k, v, cu_seqlens, o, lse, *_ = drawn.args
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k.double().repeat_interleave(2, 1))
    assert magnitude == 0 or scores.max() > 500
    fresh = reference.sliding_window_attention_forward(q, k, v, cu_seqlens, window_size=40)
    o.copy_(fresh[0])
    lse.copy_(fresh[1])
    check_case(load_kernel(w), drawn)


def test_the_same_call_gives_the_same_bits():
    w = workload()
    case = case_of(w)
    load_kernel(w).launch(*case.args)
    first = {name: out.clone() for name, out in case.outputs.items()}
    load_kernel(w).launch(*case.args)
    assert all(torch.equal(first[name], out) for name, out in case.outputs.items())


def test_nothing_to_do():
    w = workload()
    for seqlens in ((), (0,), (0, 0, 0)):
        load_kernel(w).launch(*case_of(w, seqlens).args)


def test_a_wrong_call_is_refused():
    w = workload()
    do, q, k, v, cu_seqlens, o, lse, dq, *rest = case_of(w).args
    launch = load_kernel(w).launch
    with pytest.raises(ValueError, match="gqa_ratio 2"):
        launch(do, q[:, :3], k, v, cu_seqlens, o, lse, dq, *rest)
    turned = do.transpose(0, 2).contiguous().transpose(0, 2)
    with pytest.raises(ValueError, match="last dimension"):
        launch(turned, q, k, v, cu_seqlens, o, lse, dq, *rest)
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(do, q, k, v, cu_seqlens, o, lse, turned.transpose(0, 1), *rest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("target", KNOWN_TARGETS.values(), ids=str)
def test_defaults_are_valid(target, head_dim, dtype):
    w = workload(dtype, dim=head_dim)
    space_for(w).default_schedule(w, target)
