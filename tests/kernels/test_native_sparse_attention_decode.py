"""Selected and sliding-window attention of one new token a row, and the gated sum."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.native_sparse_attention_decode import make_case
from nsagen.codegen.template import default_schedule, render
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import CACHE_DTYPES, Param, Schedule, Workload
from tests.support import (
    at_odd_bytes,
    check_case,
    kernel_device,
    kernel_dtypes,
    load_kernel,
    stretch_narrow,
)

DTYPES = kernel_dtypes()
FLOAT8 = {"cache_dtype": "float8_e4m3fn"}


def workload(dtype: str = "float32", **params: Param) -> Workload:
    usual = {
        "head_dim": 16,
        "v_head_dim": 16,
        "gqa_ratio": 2,
        "block_size": 16,
        "topk": 4,
        "window_size": 24,
    }
    return Workload.of("native_sparse_attention", "decode", dtype=dtype, **{**usual, **params})


def schedule(work: Workload, **knobs: Param) -> Schedule:
    """The default schedule but for some knobs."""
    usual = default_schedule(work, KNOWN_TARGETS["cuda:90"])
    return Schedule.of(usual.algorithm, dict(usual.knobs) | knobs)


def case_of(work: Workload, positions: tuple[int, ...], page_size: int | None = None) -> Case:
    sizes = Sizes(positions, capacity=256, page_size=page_size)
    return make_case(work, sizes, kernel_device())


def check(
    work: Workload, positions: tuple[int, ...], page_size: int | None = None, **knobs: Param
) -> None:
    case = case_of(work, positions, page_size)
    check_case(load_kernel(work, schedule(work, **knobs)), case)


def test_positions_at_every_edge() -> None:
    """Around the first blocks and the window; idle rows in between; the cache's last token."""
    check(workload(), (-1, 0, 1, 14, 15, 16, 22, 23, -1, 24, 25, 47, 48, 63, 64, 255))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    check(workload(dtype, head_dim=32, v_head_dim=32), (200, -1, 0, 130))


def test_wide_float32_groups_are_split_over_programs() -> None:
    work = workload(head_dim=128, v_head_dim=128, gqa_ratio=40)
    assert "HEAD_TILES = tl.constexpr(2)" in render(work, schedule(work), "")
    check(work, (200, -1, 7, 90))


@pytest.mark.parametrize("gqa_ratio", [1, 3, 16, 17])
def test_group_sizes(gqa_ratio: int) -> None:
    check(workload(gqa_ratio=gqa_ratio), (200, 7, 90))


@pytest.mark.parametrize("dims", [(24, 24), (80, 40), (64, 128), (192, 16)])
def test_head_dims(dims: tuple[int, int]) -> None:
    check(workload("float16", head_dim=dims[0], v_head_dim=dims[1]), (150, 40))


@pytest.mark.parametrize("block_size", [4, 12, 40, 64])
@pytest.mark.parametrize("block_n", [16, 64])
def test_blocks_smaller_and_larger_than_a_step(block_size: int, block_n: int) -> None:
    check(workload(block_size=block_size, topk=3), (255, 64, 11), block_n=block_n)


@pytest.mark.parametrize("window_size", [1, 2, 16, 33, 300])
def test_windows_from_one_token_to_more_than_there_are(window_size: int) -> None:
    check(workload(window_size=window_size, topk=1), (255, 32, 33, 0), block_n=16)


@pytest.mark.parametrize("programs", [132, 396, 2112])
def test_any_number_of_splits_gives_the_same(programs: int) -> None:
    """Up to one split a step."""
    work = workload(topk=9, window_size=100)
    check(work, (255, 3, 90), programs=programs, block_n=16)


def test_more_rows_than_programs() -> None:
    """One split a branch."""
    check(workload(topk=9, window_size=100), (200,) * 67, programs=132)


@pytest.mark.parametrize(
    ("page_size", "block_size", "window_size"),
    [(16, 16, 300), (16, 16, 1), (48, 12, 24), (128, 4, 100), (256, 64, 300)],
)
def test_pages(page_size: int, block_size: int, window_size: int) -> None:
    """Windows that lie in one page and in more of them than blocks are selected."""
    work = workload(block_size=block_size, window_size=window_size, topk=3)
    check(work, (255, -1, 0, 47, 48, 130), page_size, block_n=32)


def test_pages_and_contiguous_caches_agree_to_the_bit() -> None:
    work = workload("float16")
    outs = []
    for page_size in (None, 32):
        case = case_of(work, (255, 77, 0), page_size)
        load_kernel(work).launch(*case.args)
        outs.append(case.outputs["o"])
    assert torch.equal(*outs)


def test_entries_in_any_order_between_others_that_name_no_block() -> None:
    """-1 and repeats anywhere, blocks after the token, numbers whose token index would overflow."""
    work = workload(topk=8)
    case = case_of(work, (100, 250, 30))
    topk_idx = case.args[3]
    stray = [-1, 16, 2**31 - 1, -(2**31), 2**28, 2**28 + 1, -5, 7]
    topk_idx.copy_(torch.tensor(stray, dtype=torch.int32).expand_as(topk_idx))
    topk_idx[:, 0, ::3] = torch.tensor([5, 0, 5], dtype=torch.int32)
    topk_idx[0, 1, 2] = 15
    check_case(load_kernel(work), case)


def test_no_selected_block_leaves_the_other_branches() -> None:
    work = workload()
    case = case_of(work, (100, 0))
    case.args[3].fill_(-1)
    check_case(load_kernel(work), case)


def test_gates_choose_the_branches() -> None:
    """Gates in float32 beside tensors in float16; each branch alone, and none."""
    work = workload("float16")
    case = case_of(work, (200, 100, 50, 25))
    gate = torch.eye(4, 3, device=kernel_device())[:, None].repeat(1, 4, 1)
    args = list(case.args)
    args[7] = case.args[7].copy_(gate).float()
    check_case(load_kernel(work), dataclasses.replace(case, args=tuple(args)))


def test_large_scores_do_not_overflow() -> None:
    work = workload("float16")
    case = case_of(work, (200, 100))
    case.args[0].mul_(40)
    check_case(load_kernel(work, schedule(work, block_n=16)), case)


def test_strided_views() -> None:
    """Every other row of q and o_compressed; caches with heads before tokens; wider gates."""
    work = workload()
    case = case_of(work, (200, 77, 12))
    q, k_cache, v_cache, topk_idx, positions, slots, o_compressed, gate, *rest = case.args
    q, o_compressed = (
        torch.stack((x, torch.full_like(x, float("nan"))), 1).flatten(0, 1)[::2]
        for x in (q, o_compressed)
    )
    k_cache = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    v_cache = torch.cat((v_cache, v_cache), -1)[..., :16]
    gate = torch.cat((gate, gate), -1)[..., :3]
    args = (q, k_cache, v_cache, topk_idx, positions, slots, o_compressed, gate, *rest)
    check_case(load_kernel(work), dataclasses.replace(case, args=args))


def test_last_dimension_must_be_contiguous() -> None:
    work = workload()
    q, *rest = case_of(work, (30,)).args
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"q: the last dimension must be contiguous, got \("):
        load_kernel(work).launch(q, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16, 48])
def test_a_window_of_its_own(page_size: int | None, dtype: str) -> None:
    """The sliding branch's caches apart from the selected one's, and each read for its own part."""
    work = workload(dtype, head_dim=24)
    sizes = Sizes((-1, 0, 15, 16, 23, 24, 63, 200), capacity=256, page_size=page_size)
    case = make_case(work, sizes, kernel_device(), own_window=True)
    check_case(load_kernel(work), case)


def test_a_window_of_its_own_in_other_strides() -> None:
    work = workload()
    case = make_case(work, Sizes((30, 200), capacity=256), kernel_device(), own_window=True)
    *args, k_window_cache, v_window_cache = case.args
    turned = k_window_cache.transpose(1, 2).contiguous().transpose(1, 2)
    wider = torch.cat((v_window_cache, v_window_cache), -1)[..., :16]
    check_case(load_kernel(work), dataclasses.replace(case, args=(*args, turned, wider)))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("page_size", [None, 16, 48])
def test_quantized_caches(page_size: int | None, cache_dtype: str) -> None:
    """Numbers of a narrow dtype times the scales beside them, in slots and in pages."""
    work = workload(cache_dtype=cache_dtype, head_dim=24, v_head_dim=40)
    check(work, (-1, 0, 15, 16, 23, 24, 63, 200), page_size)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_quantized_caches_of_any_size(cache_dtype: str) -> None:
    work = workload(dtype="bfloat16", cache_dtype=cache_dtype)
    case = make_case(work, Sizes((63, 200), capacity=256), kernel_device())
    check_case(load_kernel(work), stretch_narrow(case))


@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("dims", [(32, 16), (40, 24), (64, 128)], ids=str)
def test_float8_is_read_in_pairs(dims: tuple[int, int], page_size: int | None) -> None:
    """Two numbers at once, where a key has 16 pairs or more, padded or not."""
    work = workload(dtype="bfloat16", **FLOAT8, head_dim=dims[0], v_head_dim=dims[1])
    assert "widened_pairs(v)" in render(work, schedule(work), "")
    check(work, (-1, 0, 15, 63, 200), page_size)


def test_float8_pairs_of_any_size() -> None:
    work = workload(dtype="bfloat16", **FLOAT8, head_dim=32, v_head_dim=32)
    case = make_case(work, Sizes((63, 200), capacity=256), kernel_device())
    check_case(load_kernel(work), stretch_narrow(case))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_float8_rows_at_odd_bytes_are_refused(name: str) -> None:
    """Instead of being read from the byte before."""
    work = workload(dtype="bfloat16", **FLOAT8, head_dim=32, v_head_dim=32)
    case = make_case(work, Sizes((63, 200), capacity=256), kernel_device())
    args = list(case.args)
    place = {"k_cache": 1, "v_cache": 2}[name]
    args[place] = at_odd_bytes(args[place])
    with pytest.raises(ValueError, match=f"{name}: rows must start at even bytes"):
        load_kernel(work).launch(*args)
