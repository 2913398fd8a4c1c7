"""Compressed attention of one new token a row, and the blocks that it selects."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.compressed_attention_decode import make_case
from nsagen.codegen.template import default_schedule, render, space_for
from nsagen.core.errors import UnsupportedWorkloadError
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
        "kernel_size": 8,
        "kernel_stride": 4,
        "block_size": 16,
        "topk": 4,
        "init_blocks": 1,
        "local_blocks": 2,
    }
    return Workload.of("compressed_attention", "decode", dtype=dtype, **{**usual, **params})


def schedule(work: Workload, **knobs: Param) -> Schedule:
    """The default schedule but for some knobs."""
    usual = default_schedule(work, KNOWN_TARGETS["cuda:90"])
    return Schedule.of(usual.algorithm, dict(usual.knobs) | knobs)


def whole_rows(work: Workload, **knobs: Param) -> Schedule:
    """That of one kernel where the caches hold few windows."""
    usual = space_for(work, "whole_rows").default_schedule(work, KNOWN_TARGETS["cuda:90"])
    return Schedule.of("whole_rows", dict(usual.knobs) | knobs)


def check(
    work: Workload,
    positions: tuple[int, ...],
    capacity: int = 320,
    kv_heads: int = 2,
    page_size: int | None = None,
    **knobs: Param,
) -> None:
    sizes = Sizes(positions, kv_heads=kv_heads, capacity=capacity, page_size=page_size)
    check_case(load_kernel(work, schedule(work, **knobs)), make_case(work, sizes, kernel_device()))


def test_positions_at_every_edge() -> None:
    """Around the first windows, blocks and places for blocks; idle rows in between."""
    work = workload()
    check(work, (-1, 0, 5, 6, 7, 8, 10, 11, 12, 15, 16, -1, 31, 32, 63, 64, 65, 79, 80, 300))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    check(workload(dtype, head_dim=32, v_head_dim=32), (319, -1, 0, 130))


@pytest.mark.parametrize(("size", "stride", "block"), [(8, 4, 128), (4, 1, 37), (48, 1, 20)])
def test_blocks_of_more_windows_than_a_step(size: int, stride: int, block: int) -> None:
    """Several steps share a block: the last one is full or not, and the row ends in any of them."""
    work = workload(kernel_size=size, kernel_stride=stride, block_size=block)
    assert block // stride > 16
    edges = (-1, 0, size - 1, block + 16 * stride - 1, block + 17 * stride, 2 * block - 1, 299)
    check(work, edges, block_n=16)
    pages = {"page_size": 2 * block, "capacity": 2 * block * -(-320 // (2 * block))}
    check(work, edges[-3:], **pages, block_n=16, programs=2112)


def test_wide_float32_groups_are_split_over_programs() -> None:
    work = workload(head_dim=128, v_head_dim=128, gqa_ratio=40)
    assert "HEAD_TILES = tl.constexpr(2)" in render(work, schedule(work), "")
    check(work, (200, -1, 7, 90), capacity=208, kv_heads=1)


@pytest.mark.parametrize("gqa_ratio", [1, 3, 16, 17])
def test_group_sizes(gqa_ratio: int) -> None:
    check(workload(gqa_ratio=gqa_ratio), (200, 7, 90), capacity=208)


@pytest.mark.parametrize("dims", [(24, 24), (80, 40), (64, 128), (192, 16)])
def test_head_dims(dims: tuple[int, int]) -> None:
    check(workload("float16", head_dim=dims[0], v_head_dim=dims[1]), (150, 40), capacity=160)


@pytest.mark.parametrize(
    ("size", "stride", "block"),
    [(32, 16, 64), (4, 4, 4), (16, 4, 4), (12, 4, 12), (8, 8, 40), (40, 8, 16), (8, 2, 64)],
)
def test_windows_that_reach_no_one_or_several_blocks(size: int, stride: int, block: int) -> None:
    work = workload(kernel_size=size, kernel_stride=stride, block_size=block)
    check(work, (299, size - 1, size - 2, block, 5 * block + 3), capacity=600)


@pytest.mark.parametrize(
    "forced",
    [(1, 0, 0), (1, 1, 0), (1, 0, 1), (3, 1, 2), (5, 0, 3), (8, 3, 0), (64, 1, 2)],
    ids=str,
)
def test_forced_blocks(forced: tuple[int, int, int]) -> None:
    topk, init, local = forced
    work = workload(topk=topk, init_blocks=init, local_blocks=local)
    check(work, (0, 15, 16, 31, 32, 47, 48, 100, 319))


@pytest.mark.parametrize("programs", [132, 2112])
@pytest.mark.parametrize("block_n", [16, 32])
def test_any_number_of_splits_gives_the_same(programs: int, block_n: int) -> None:
    """From one split a row to more splits than tiles; rows share one number of splits."""
    check(workload(), (1279, 5, 700, -1), capacity=1280, programs=programs, block_n=block_n)
    check(workload(), (599,), capacity=600, kv_heads=1, programs=programs, block_n=block_n)


def test_several_programs_score_and_the_last_selects() -> None:
    """8 programs a group; also for rows that a single one of them could score, and idle ones."""
    work = workload(gqa_ratio=16)
    case = make_case(work, Sizes((1279, 5, 700, -1, 260), capacity=1280), kernel_device())
    module = load_kernel(work, schedule(work, combine_warps=1))
    for _ in range(3):  # a launch leaves nothing behind that the next one trips over
        check_case(module, case)


@pytest.mark.parametrize(("page_size", "block_n"), [(16, 64), (48, 16), (320, 64)])
def test_pages(page_size: int, block_n: int) -> None:
    """Tiles that lie in several pages, and several tiles in one."""
    check(workload(), (319, 5, -1, 130, 15, 16), page_size=page_size, block_n=block_n)
    check(workload(block_size=8), (200, 77), page_size=page_size, block_n=block_n, programs=2112)


def test_pages_and_contiguous_caches_agree_to_the_bit() -> None:
    work = workload("float16")
    outs = []
    for page_size in (None, 32):
        sizes = Sizes((319, 77, 0), capacity=320, page_size=page_size)
        case = make_case(work, sizes, kernel_device())
        load_kernel(work).launch(*case.args)
        outs.append(case.outputs)
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])


def test_capacity_far_beyond_the_context() -> None:
    check(workload(), (40, 3), capacity=5000)


def test_full_cache() -> None:
    """Positions after the last window that the cache can hold, up to its last token."""
    check(workload(), (255, 254, 253, 252, 251), capacity=256)
    check(workload(local_blocks=0), (259, 258, 256, 255), capacity=260)


def test_cache_without_room_for_a_window() -> None:
    check(workload(), (3, 0, -1), capacity=4)


def test_equal_scores_go_to_the_lower_block() -> None:
    work = workload(gqa_ratio=3)
    case = make_case(work, Sizes((319, 200, 66), capacity=320), kernel_device())
    case.args[1].nan_to_num_().zero_()
    check_case(load_kernel(work, schedule(work, block_n=16, programs=2112)), case)


def test_blocks_with_equal_content_tie_across_tiles() -> None:
    work = workload(topk=6, local_blocks=1)
    case = make_case(work, Sizes((511,), kv_heads=1, capacity=512), kernel_device())
    _, ck_cache, _, _, slots, *_ = case.args
    keys = ck_cache[slots[0]]  # the same four keys in every block
    keys.copy_(keys[:4].repeat(32, 1, 1)[: len(keys)])
    check_case(load_kernel(work, schedule(work, block_n=16)), case)


@pytest.mark.parametrize("seed", [0, 9, 24])
def test_large_scores_neither_overflow_nor_vanish(seed: int) -> None:
    """Most probabilities are below what float32 holds: those blocks may be taken in any order."""
    work = workload("float16")
    case = make_case(work, Sizes((319, 100), capacity=320), kernel_device(), seed)
    case.args[0].mul_(40)
    check_case(load_kernel(work, schedule(work, block_n=16)), case)


def test_a_block_in_the_place_of_a_better_one_is_told() -> None:
    work = workload("float16")
    case = make_case(work, Sizes((319, 100), capacity=320), kernel_device())
    load_kernel(work).launch(*case.args)
    chosen = case.outputs["topk_idx"]
    assert torch.equal(case.expected()["topk_idx"].cpu(), chosen.cpu())
    rival = chosen[0, 0, 1].item()
    chosen[0, 0, 1] = 1 if rival != 1 else 2
    assert case.expected()["topk_idx"][0, 0, 1] == rival


def test_strided_views() -> None:
    """Heads of q between others; caches as slices of wider ones, tokens after heads."""
    work = workload()
    case = make_case(work, Sizes((319, 77, 12), capacity=320), kernel_device())
    q, ck_cache, cv_cache, *rest = case.args
    q = torch.stack((q, q.new_full(q.shape, float("nan"))), 1).flatten(0, 1)[::2]
    ck_cache = ck_cache.transpose(1, 2).contiguous().transpose(1, 2)
    cv_cache = torch.cat((cv_cache, cv_cache), -1)[..., :16]
    check_case(load_kernel(work), _with(case, q, ck_cache, cv_cache, *rest))


def test_last_dimension_must_be_contiguous() -> None:
    work = workload()
    case = make_case(work, Sizes((30,), capacity=64), kernel_device())
    q, *rest = case.args
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"q: the last dimension must be contiguous, got \("):
        load_kernel(work).launch(q, *rest)


def _with(case: Case, *args: object) -> Case:
    return dataclasses.replace(case, args=args)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("page_size", [None, 32])
def test_quantized_caches(page_size: int | None, cache_dtype: str) -> None:
    """Numbers of a narrow dtype times the scales beside them, in slots and in pages."""
    work = workload(cache_dtype=cache_dtype, head_dim=24, v_head_dim=40)
    check(work, (-1, 0, 15, 16, 63, 200), page_size=page_size)


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
    check(work, (-1, 0, 15, 16, 63, 200), page_size=page_size)


def test_float8_pairs_of_any_size() -> None:
    work = workload(dtype="bfloat16", **FLOAT8, head_dim=32, v_head_dim=32)
    case = make_case(work, Sizes((63, 200), capacity=256), kernel_device())
    check_case(load_kernel(work), stretch_narrow(case))


@pytest.mark.parametrize("name", ["ck_cache", "cv_cache"])
def test_float8_rows_at_odd_bytes_are_refused(name: str) -> None:
    """Instead of being read from the byte before."""
    work = workload(dtype="bfloat16", **FLOAT8, head_dim=32, v_head_dim=32)
    case = make_case(work, Sizes((63, 200), capacity=256), kernel_device())
    args = list(case.args)
    place = {"ck_cache": 1, "cv_cache": 2}[name]
    args[place] = at_odd_bytes(args[place])
    with pytest.raises(ValueError, match=f"{name}: rows must start at even bytes"):
        load_kernel(work).launch(*args)


def _launches(module: ModuleType, case: Case, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a checked call starts the second kernel."""
    started: list[object] = []
    second = module.combine_splits

    class Counted:
        def __getitem__(self, grid: object) -> object:
            started.append(grid)
            return second[grid]

    monkeypatch.setattr(module, "combine_splits", Counted())
    for _ in range(2):
        check_case(module, case)
    return bool(started)


@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_kernel_where_caches_hold_few_windows(
    dtype: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 16 windows in turn, at every edge; the next larger caches take two kernels."""
    work = workload(dtype, head_dim=32, v_head_dim=24, gqa_ratio=3)
    edges = (-1, 0, 6, 7, 11, 15, 16, 63, 64, 80, 255)
    module = load_kernel(work, whole_rows(work, block_n=16))
    for capacity, two in ((256, False), (288, True)):
        sizes = Sizes(edges, kv_heads=2, capacity=capacity, page_size=page_size)
        case = make_case(work, sizes, kernel_device())
        assert _launches(module, case, monkeypatch) is two


@pytest.mark.parametrize("gqa_ratio", [1, 16, 17, 64])
@pytest.mark.parametrize("forced", [(1, 0, 0), (4, 1, 2), (8, 3, 0), (64, 1, 2)], ids=str)
def test_one_kernel_of_any_group_and_forced_blocks(
    gqa_ratio: int, forced: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    topk, init, local = forced
    work = workload("float16", gqa_ratio=gqa_ratio, topk=topk, init_blocks=init, local_blocks=local)
    case = make_case(work, Sizes((319, 0, 31, 32, 100), capacity=320), kernel_device())
    assert not _launches(load_kernel(work, whole_rows(work)), case, monkeypatch)


@pytest.mark.parametrize(
    ("size", "stride", "block"), [(4, 4, 4), (12, 4, 12), (8, 8, 40), (40, 8, 16), (4, 1, 37)]
)
def test_one_kernel_of_other_windows(
    size: int, stride: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That reach no or several blocks, and more in a block than a step takes."""
    work = workload(kernel_size=size, kernel_stride=stride, block_size=block)
    knobs = {"block_n": 16} if stride == 1 else {}
    case = make_case(work, Sizes((148, size - 1, size - 2, block), capacity=150), kernel_device())
    module = load_kernel(work, whole_rows(work, whole_tiles=16, **knobs))
    assert not _launches(module, case, monkeypatch)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dims", [(32, 16), (24, 40)], ids=str)
def test_one_kernel_reads_narrow_caches(
    cache_dtype: str, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workload("bfloat16", cache_dtype=cache_dtype, head_dim=dims[0], v_head_dim=dims[1])
    case = make_case(work, Sizes((-1, 0, 15, 63, 200), capacity=256), kernel_device())
    assert not _launches(load_kernel(work, whole_rows(work)), case, monkeypatch)
    case = make_case(work, Sizes((63, 200), capacity=256), kernel_device())
    check_case(load_kernel(work, whole_rows(work)), stretch_narrow(case))


def test_one_kernel_takes_equal_scores_in_order_and_large_ones() -> None:
    work = workload("float16", gqa_ratio=3)
    case = make_case(work, Sizes((319, 200, 66), capacity=320), kernel_device())
    case.args[1].nan_to_num_().zero_()
    check_case(load_kernel(work, whole_rows(work)), case)
    case = make_case(work, Sizes((319, 100), capacity=320), kernel_device())
    case.args[0].mul_(40)
    check_case(load_kernel(work, whole_rows(work)), case)
    case = make_case(work, Sizes((3, 0, -1), capacity=4), kernel_device())  # no room for a window
    check_case(load_kernel(work, whole_rows(work)), case)


def test_programs_that_share_a_group_cannot_select_alone() -> None:
    work = workload(head_dim=128, v_head_dim=128, gqa_ratio=40)
    with pytest.raises(UnsupportedWorkloadError, match="needs an algorithm that covers it"):
        space_for(work, "whole_rows")
