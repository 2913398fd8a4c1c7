"""Selected attention of one new token a row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.selected_attention_decode import make_case
from nsagen.codegen.template import default_schedule, render
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import CACHE_DTYPES, Param, Schedule, Workload
from tests.float8_interpreter import round_to_float8
from tests.support import (
    at_odd_bytes,
    check_case,
    kernel_device,
    kernel_dtypes,
    load_kernel,
    stretch_narrow,
)

FLOAT8 = {"cache_dtype": "float8_e4m3fn"}
EDGES = (-1, 0, 1, 14, 15, 16, -1, 24, 47, 48, 63, 64, 255)


def workload(dtype: str = "float32", **params: Param) -> Workload:
    usual = {"head_dim": 16, "v_head_dim": 16, "gqa_ratio": 2, "block_size": 16, "topk": 4}
    return Workload.of("selected_attention", "decode", dtype=dtype, **{**usual, **params})


def schedule(work: Workload, **knobs: Param) -> Schedule:
    """The default schedule but for some knobs."""
    usual = default_schedule(work, KNOWN_TARGETS["cuda:90"])
    return Schedule.of(usual.algorithm, dict(usual.knobs) | knobs)


def case_of(work: Workload, positions: tuple[int, ...], page_size: int | None = None) -> Case:
    return make_case(work, Sizes(positions, capacity=256, page_size=page_size), kernel_device())


def check(
    work: Workload, positions: tuple[int, ...], page_size: int | None = None, **knobs: Param
) -> None:
    case = case_of(work, positions, page_size)
    check_case(load_kernel(work, schedule(work, **knobs)), case)


def test_positions_at_every_edge() -> None:
    """Around the blocks' ends; idle rows in between; the cache's last token."""
    check(workload(), EDGES)


def test_a_row_of_one_split_is_written_by_one_kernel() -> None:
    """As many rows as fill the GPU by themselves, at the same edges; the result is the same to the
    rounding of its parts."""
    check(workload(topk=2), EDGES * 6, programs=132, block_n=16)


@pytest.mark.parametrize("dtype", kernel_dtypes())
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


@pytest.mark.parametrize("block_size", [4, 12, 40, 128])
@pytest.mark.parametrize("block_n", [16, 64])
def test_blocks_smaller_and_larger_than_a_step(block_size: int, block_n: int) -> None:
    check(workload(block_size=block_size, topk=3), (255, 64, 11), block_n=block_n)


@pytest.mark.parametrize("topk", [1, 7, 96])
def test_any_number_of_blocks(topk: int) -> None:
    """More than a sequence has among them."""
    check(workload(topk=topk, block_size=4), (255, 130, 3), block_n=16)


@pytest.mark.parametrize("programs", [132, 2112])
def test_any_number_of_splits_gives_the_same(programs: int) -> None:
    """Up to one split a step, and more than the second kernel reads at once."""
    check(workload(topk=40, block_size=4), (255, 3, 90), programs=programs, block_n=16)


@pytest.mark.parametrize(("page_size", "block_size"), [(16, 16), (48, 12), (256, 64)])
@pytest.mark.parametrize("programs", [132, 396])
def test_pages(page_size: int, block_size: int, programs: int) -> None:
    work = workload(block_size=block_size, topk=3)
    rows = (255, -1, 0, 47, 48, 130) * (1 if programs == 396 else 12)
    check(work, rows, page_size, block_n=32, programs=programs)


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


@pytest.mark.parametrize("rows", [2, 67])
def test_no_selected_block_gives_zeros(rows: int) -> None:
    case = case_of(workload(), (100,) * rows)
    case.args[3].fill_(-1)
    load_kernel(workload()).launch(*case.args)
    assert (case.outputs["o"] == 0).all()


def test_large_scores_do_not_overflow() -> None:
    work = workload("float16")
    case = case_of(work, (200, 100))
    case.args[0].mul_(40)
    check_case(load_kernel(work, schedule(work, block_n=16)), case)


def test_strided_views() -> None:
    """Every other row of q; caches with heads before tokens; wider values."""
    case = case_of(workload(), (200, 77, 12))
    q, k_cache, v_cache, *rest = case.args
    q = torch.stack((q, torch.full_like(q, float("nan"))), 1).flatten(0, 1)[::2]
    k_cache = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    v_cache = torch.cat((v_cache, v_cache), -1)[..., :16]
    args = (q, k_cache, v_cache, *rest)
    check_case(load_kernel(workload()), dataclasses.replace(case, args=args))


def test_last_dimension_must_be_contiguous() -> None:
    q, *rest = case_of(workload(), (30,)).args
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"q: the last dimension must be contiguous, got \("):
        load_kernel(workload()).launch(q, *rest)


@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_quantized_caches(
    cache_dtype: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention to the keys and values that the caches give back."""
    if kernel_device() == "cpu":
        round_to_float8(monkeypatch)
    check(workload(cache_dtype=cache_dtype, v_head_dim=24), EDGES, page_size)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_quantized_caches_of_any_size(cache_dtype: str) -> None:
    work = workload("bfloat16", cache_dtype=cache_dtype)
    check_case(load_kernel(work), stretch_narrow(case_of(work, (63, 200))))


@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("dims", [(32, 16), (40, 24), (64, 128)], ids=str)
def test_float8_is_read_in_pairs(
    dims: tuple[int, int], page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two numbers at once, where a key has 16 pairs or more, padded or not."""
    if kernel_device() == "cpu":
        round_to_float8(monkeypatch)
    work = workload("bfloat16", **FLOAT8, head_dim=dims[0], v_head_dim=dims[1])
    assert "widened_pairs(v)" in render(work, schedule(work), "")
    check(work, EDGES, page_size)


def test_float8_pairs_of_any_size() -> None:
    work = workload("bfloat16", **FLOAT8, head_dim=32, v_head_dim=32)
    check_case(load_kernel(work), stretch_narrow(case_of(work, (63, 200))))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_float8_rows_at_odd_bytes_are_refused(name: str) -> None:
    """Instead of being read from the byte before."""
    work = workload("bfloat16", **FLOAT8, head_dim=32, v_head_dim=32)
    args = list(case_of(work, (63, 200)).args)
    place = {"k_cache": 1, "v_cache": 2}[name]
    args[place] = at_odd_bytes(args[place])
    with pytest.raises(ValueError, match=f"{name}: rows must start at even bytes"):
        load_kernel(work).launch(*args)
