"""Block selection's kernel against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.cases.base import Case, Sizes
from nsagen.cases.block_selection import (
    allow_near,
    expected_blocks,
    lse_of,
    make_case,
    rule_of,
)
from nsagen.codegen.space import next_power_of_2
from nsagen.codegen.template import render, space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops.reference.block_selection import select_blocks
from tests.kernels.small_selections import RAGGED, small, workload_of
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel


def case_of(workload: Workload, seqlens: tuple[int, ...] = RAGGED, kv_heads: int = 1) -> Case:
    return make_case(workload, Sizes(seqlens, kv_heads), kernel_device())


def args_of(case: Case) -> Any:
    """The arguments of `launch`, which a test may change in place."""
    return case.args


def selected(workload: Workload, case: Case, schedule: Schedule | None = None) -> Tensor:
    load_kernel(workload, schedule or small()).launch(*case.args)
    return case.outputs["topk_idx"].cpu()


@pytest.mark.parametrize("gqa_ratio", [1, 3, 5, 7, 12, 16, 64])
def test_group_sizes(gqa_ratio: int) -> None:
    workload = workload_of(gqa_ratio=gqa_ratio)
    check_case(load_kernel(workload, small()), case_of(workload, (0, 3, 70), 2))


@pytest.mark.parametrize("head_dim", [24, 80, 128, 256])
@pytest.mark.parametrize("dtype", kernel_dtypes()[1:])
def test_head_sizes(head_dim: int, dtype: str) -> None:
    workload = workload_of(dtype, head_dim=head_dim)
    check_case(load_kernel(workload, small()), case_of(workload, (30, 0, 65)))


@pytest.mark.parametrize(
    ("kernel_size", "kernel_stride", "block_size"),
    [(8, 8, 8), (32, 16, 64), (48, 4, 12), (4, 1, 16), (5, 1, 3), (16, 8, 40), (24, 8, 16)],
)
def test_windows_and_blocks(kernel_size: int, kernel_stride: int, block_size: int) -> None:
    """Windows that span several blocks, blocks that are no multiple of a window, odd ratios."""
    workload = workload_of(
        kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size
    )
    check_case(load_kernel(workload, small()), case_of(workload, (2, 9 * block_size + 5)))


def test_windows_of_128_tokens_at_every_token() -> None:
    workload = workload_of(kernel_size=128, kernel_stride=1, block_size=16)
    check_case(load_kernel(workload, small()), case_of(workload, (127, 190)))


@pytest.mark.parametrize(
    ("kernel_size", "kernel_stride", "block_size"),
    [(4, 2, 64), (4, 1, 37), (96, 1, 20), (4, 4, 80)],
)
def test_blocks_of_more_windows_than_a_step(
    kernel_size: int, kernel_stride: int, block_size: int
) -> None:
    """Several steps share a block; its last one is full or not, and windows reach 0 to 5 blocks."""
    workload = workload_of(
        kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size, topk=4
    )
    assert block_size // kernel_stride > int(small().windows)
    case = case_of(workload, (2, 5 * block_size + 11))
    check_case(load_kernel(workload, small(tokens=16)), case)


def test_queries_of_wide_groups_are_loaded_at_each_step() -> None:
    workload = workload_of(head_dim=256, gqa_ratio=48)
    schedule = small(tokens=1, columns=16, num_stages=1)
    assert "q_rows_2" in render(workload, schedule, "")
    check_case(load_kernel(workload, schedule), case_of(workload, (3, 40)))


@pytest.mark.parametrize(
    ("topk", "init_blocks", "local_blocks"),
    [(1, 0, 0), (1, 1, 0), (1, 0, 1), (3, 1, 2), (5, 0, 0), (7, 3, 4), (33, 2, 1), (64, 1, 2)],
)
def test_choices(topk: int, init_blocks: int, local_blocks: int) -> None:
    workload = workload_of(topk=topk, init_blocks=init_blocks, local_blocks=local_blocks)
    check_case(
        load_kernel(workload, small()), case_of(workload, (*RAGGED, 310) if topk > 32 else RAGGED)
    )


@pytest.mark.parametrize(
    "knobs",
    [
        {"tokens": 8, "columns": 16},
        {"tokens": 32, "columns": 32},
        {"windows": 64, "segment": 64},
        {"windows": 32, "segment": 256, "num_stages": 1},
        {"programs": 132, "num_warps": 1},
    ],
    ids=str,
)
def test_schedules(knobs: dict[str, Any]) -> None:
    workload = workload_of("float16", gqa_ratio=3)
    check_case(load_kernel(workload, small(**knobs)), case_of(workload, (21, 0, 140)))


def test_tiles_of_one_token() -> None:
    """What large groups of wide heads need where shared memory is small."""
    workload = workload_of(gqa_ratio=12)
    check_case(load_kernel(workload, small(tokens=1)), case_of(workload, (5, 29)))


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_default_schedule(dtype: str) -> None:
    workload = workload_of(dtype, head_dim=64, gqa_ratio=16, kernel_size=8, block_size=8)
    space = space_for(workload, "resident_scores")
    schedule = space.default_schedule(workload, KNOWN_TARGETS["cuda:90"])
    check_case(load_kernel(workload, schedule), case_of(workload, (40, 130, 3)))


def test_equal_windows_tie_exactly() -> None:
    """Whatever step, segment or program a block is summed in: all that tie go by their index."""
    workload = workload_of(local_blocks=1, kernel_size=24, kernel_stride=4, block_size=12, topk=4)
    case = case_of(workload, (444,))
    q, k, lse, *offsets, _, scale = args_of(case)
    q.fill_(0.5)  # exact sums, in every order
    k.fill_(0.25)
    lse.copy_(lse_of(workload, q, k, offsets[0], offsets[1], scale))
    came = selected(workload, case)
    check_case(load_kernel(workload, small()), case)
    # Block 0 is forced. Block 1 reaches back to fewer windows than the others, which tie.
    assert came[0, -1].tolist() == [0, 2, 3, 36]


def test_no_probability_goes_by_index() -> None:
    """All mass on window 0: blocks without any, seen or flushed to 0, follow in order."""
    workload = workload_of(init_blocks=0, local_blocks=0, topk=3)
    case = case_of(workload, (200,))
    q, k, lse, *offsets, _, scale = args_of(case)
    q.fill_(4.0)
    k.zero_()
    k[0] = 100.0
    lse.copy_(lse_of(workload, q, k, offsets[0], offsets[1], scale))
    assert selected(workload, case)[0, -1].tolist() == [0, 1, 2]


def test_ascending_and_descending_scores() -> None:
    """Each segment replaces all that was kept; or nothing."""
    workload = workload_of(gqa_ratio=1, kernel_stride=4, topk=5)
    for sign in (1.0, -1.0):
        case = case_of(workload, (400,))
        q, k, lse, *offsets, _, scale = args_of(case)
        q.fill_(0.25)
        k.copy_((sign * torch.arange(k.shape[0]) / 64)[:, None, None])
        lse.copy_(lse_of(workload, q, k, offsets[0], offsets[1], scale))
        check_case(load_kernel(workload, small()), case)
        rest = [96, 97] if sign > 0 else [1, 2]
        assert case.outputs["topk_idx"][0, -1].tolist() == [0, *rest, 98, 99]


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (7,), (1, 7, 2)])
def test_no_window(lengths: tuple[int, ...]) -> None:
    """Without a visible window lse is -inf and the lowest candidates fill the places."""
    workload = workload_of(kernel_size=8, topk=2, init_blocks=0, local_blocks=0)
    case = case_of(workload, lengths)
    assert (args_of(case)[2] == float("-inf")).all()
    came = selected(workload, case)
    check_case(load_kernel(workload, small()), case)
    at = [[0, 1] if t >= 4 else [0, -1] for length in lengths for t in range(length)]
    assert came[0].tolist() == at


def test_fewer_windows_than_tokens_allow() -> None:
    """cu_seqlens_k decides how many windows there are; what lies behind is another sequence's."""
    workload = workload_of()
    case = case_of(workload, (40, 40))
    q, k, lse, *offsets, _, scale = args_of(case)
    offsets[1].copy_(torch.tensor([0, 5, 24]))
    lse.copy_(lse_of(workload, q, k, offsets[0], offsets[1], scale))
    check_case(load_kernel(workload, small()), case)


def test_strided_views() -> None:
    """Heads and tokens may lie anywhere, as in slices of one fused projection."""
    workload = workload_of("float16", gqa_ratio=3)
    case = case_of(workload, (70, 21), 2)
    q, k, *rest = args_of(case)
    came = selected(workload, case).clone()
    wide = torch.full((q.shape[0], q.shape[1] + 3, 32), float("nan")).to(q)
    wide[:, 2:-1, 8:24] = q
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    case.outputs["topk_idx"].fill_(-7)
    load_kernel(workload, small()).launch(wide[:, 2:-1, 8:24], k, *rest)
    assert torch.equal(case.outputs["topk_idx"].cpu(), came)


@pytest.mark.parametrize("chunk", [1, 37])
def test_chunked_prefill_selects_what_one_call_selects(chunk: int) -> None:
    """Later queries of two sequences, with all windows so far and their positions."""
    workload = workload_of("float16", gqa_ratio=3)
    lengths, kernel = (50, 150), load_kernel(workload, small())
    case = case_of(workload, lengths, 2)
    kernel.launch(*case.args)
    q, k, lse, _, cu_seqlens_k, whole, scale = args_of(case)
    rows = [torch.arange(n - chunk, n) + at for n, at in zip(lengths, (0, 50), strict=True)]
    tokens = torch.cat(rows).to(whole.device)
    starts = torch.tensor([n - chunk for n in lengths], dtype=torch.int32).to(whole.device)
    ends = torch.tensor([0, chunk, 2 * chunk], dtype=torch.int32).to(whole.device)
    part = torch.full_like(whole[:, tokens], -7)
    kernel.launch(q[tokens], k, lse[tokens], ends, cu_seqlens_k, part, scale, starts)
    assert torch.equal(part, whole[:, tokens])
    again = (rule_of(workload), q[tokens], k, lse[tokens], ends, cu_seqlens_k, part, scale, starts)
    assert torch.equal(part, expected_blocks(*again))


def test_nan_stays_in_its_row() -> None:
    """A NaN query neither hangs the search nor writes past its row nor reaches its neighbours."""
    workload = workload_of(gqa_ratio=1)
    case = case_of(workload, (180,))
    clean = selected(workload, case).clone()
    args_of(case)[0][100] = float("nan")
    came = selected(workload, case)
    assert torch.equal(came[:, :100], clean[:, :100])
    assert torch.equal(came[:, 101:], clean[:, 101:])
    assert came[0, 100].tolist() == [0, 1, 2, 3, 24, 25]


def test_wrong_arguments() -> None:
    workload = workload_of()
    launch = load_kernel(workload, small()).launch
    q, k, lse, *offsets, topk_idx, scale = args_of(case_of(workload, (90,)))
    with pytest.raises(ValueError, match="head_dim 16"):
        launch(q[..., :8], k, lse, *offsets, topk_idx, scale)
    with pytest.raises(ValueError, match="gqa_ratio 2"):
        launch(q[:, :1], k, lse, *offsets, topk_idx, scale)
    with pytest.raises(ValueError, match="contiguous"):
        launch(q, k, lse.t().contiguous().t(), *offsets, topk_idx, scale)
    with pytest.raises(ValueError, match="last dimension"):
        launch(q.transpose(0, 2).contiguous().transpose(0, 2), k, lse, *offsets, topk_idx, scale)
    with pytest.raises(ValueError, match="topk_idx must be"):
        launch(q, k, lse, *offsets, topk_idx[..., :5].contiguous(), scale)


def test_only_nearly_equal_blocks_may_swap() -> None:
    """What `expected` accepts in place of the exact choice, and what it does not."""
    rule = rule_of(workload_of(topk=3, init_blocks=1, local_blocks=0))
    scores = torch.tensor([9.0, 5.0, 5.0 * (1 + 1e-6), 1.0, 5.0, 0.0]).double().expand(1, 6, 6)
    tokens = torch.full((6,), 23)
    exact = select_blocks(scores, tokens, rule)[0, 0].tolist()
    assert exact == [0, 1, 2]
    #       a near swap  a wrong tie  too low    unordered  forced one missing  too few
    came = [[0, 1, 4], [0, 2, 4], [0, 2, 3], [0, 2, 1], [1, 2, 4], [0, 1, -1]]
    allowed = allow_near(torch.tensor([came], dtype=torch.int32), scores, tokens, rule)[0].tolist()
    assert allowed == [[0, 1, 4], *[exact] * 5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("target", KNOWN_TARGETS.values(), ids=str)
def test_defaults_are_valid(target: Any, head_dim: int, dtype: str) -> None:
    width = 4 if dtype == "float32" else 2
    for gqa_ratio in (1, 7, 16, 64):
        if width * next_power_of_2(head_dim) * (gqa_ratio + 16) + 4 > target.shared_memory:
            continue  # one token's heads and the smallest step of keys do not fit: refused by name
        for block_size in (2, 8, 24):
            workload = workload_of(
                dtype, head_dim=head_dim, gqa_ratio=gqa_ratio, block_size=block_size
            )
            space_for(workload, "resident_scores").default_schedule(workload, target)
