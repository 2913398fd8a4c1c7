"""Block selection's decode kernels against the float64 reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from nsagen.cases.base import Sizes
from nsagen.cases.block_selection import rule_of
from nsagen.cases.block_selection_decode import make_case
from nsagen.codegen.template import default_schedule
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import CACHE_DTYPES, Schedule, Workload
from tests.float8_interpreter import round_to_float8
from tests.kernels import small_selections
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

FORMS = (
    ("softmax", "sum", "overlap"),
    ("softmax", "sum", "max"),
    ("softmax", "each", "max"),
    ("none", "sum", "max"),
    ("none", "each", "max"),
)
# Idle, the first token, before and at the first window's end, longer ones.
POSITIONS = (-1, 0, 2, 3, 29, 60)

workload_of = partial(small_selections.workload_of, pass_="decode")


SMALL = Schedule.of("split_keys", block_n=16, programs=132, num_warps=4, num_stages=2)


def check(workload: Workload, positions: tuple[int, ...] = POSITIONS, **sizes: Any) -> None:
    given = {"kv_heads": 1, "capacity": max(positions) + 3, **sizes}
    case = make_case(workload, Sizes(positions, **given), kernel_device())
    check_case(load_kernel(workload, SMALL), case)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_forms(form: tuple[str, str, str], dtype: str) -> None:
    check(workload_of(dtype, form=form))


@pytest.mark.parametrize("form", FORMS[1:], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 1, 8), (8, 8, 8), (8, 2, 4), (5, 1, 3)], ids=str)
def test_windows_and_blocks(form: tuple[str, str, str], shape: tuple[int, int, int]) -> None:
    """Tokens one by one, blocks that are one window, windows that span blocks, odd ratios."""
    size, stride, block = shape
    check(workload_of(form=form, kernel_size=size, kernel_stride=stride, block_size=block), (4, 61))


@pytest.mark.parametrize("form", [FORMS[1], FORMS[4]], ids="-".join)
@pytest.mark.parametrize("page_size", [4, 16])
def test_pages(form: tuple[str, str, str], page_size: int) -> None:
    check(workload_of(form=form), page_size=page_size, capacity=64)


@pytest.mark.parametrize("form", [FORMS[1], FORMS[4]], ids="-".join)
@pytest.mark.parametrize("choice", [(1, 0, 0), (5, 0, 0), (36, 1, 3)], ids=str)
def test_choices(form: tuple[str, str, str], choice: tuple[int, int, int]) -> None:
    topk, init_blocks, local_blocks = choice
    rule = {"topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}
    check(workload_of(form=form, **rule), (*POSITIONS, 170) if topk > 32 else POSITIONS)


@pytest.mark.parametrize("form", [FORMS[1], FORMS[4]], ids="-".join)
@pytest.mark.parametrize(("gqa_ratio", "head_dim"), [(1, 24), (3, 64), (16, 128)])
def test_heads(form: tuple[str, str, str], gqa_ratio: int, head_dim: int) -> None:
    check(workload_of(form=form, gqa_ratio=gqa_ratio, head_dim=head_dim), (5, 40), kv_heads=2)


def test_many_splits() -> None:
    """Each split of a row walks a part; those of a short row have nothing to do."""
    check(workload_of(form=FORMS[1]), (3, 250), capacity=256)
    check(workload_of(form=FORMS[4], kernel_size=1, kernel_stride=1), (3, 250), capacity=256)


@pytest.mark.parametrize("form", [FORMS[1], FORMS[4]], ids="-".join)
def test_more_blocks_than_one_warp_chooses_from(form: tuple[str, str, str]) -> None:
    """Several warps choose beyond 256 blocks; of equal scores the lowest blocks win there too."""
    work = workload_of(form=form, kernel_size=1, kernel_stride=1, block_size=4, topk=6)
    check(work, (3, 1300), capacity=1304)
    case = make_case(work, Sizes((3, 1300), 1, capacity=1304), kernel_device())
    case.args[1].nan_to_num_().fill_(0.5)
    load_kernel(work, SMALL).launch(*case.args)
    rule = rule_of(work)
    local = [*range(326 - rule.local_blocks, 326)]
    for chosen in case.outputs["topk_idx"][:, 1].tolist():
        assert chosen == [*range(6 - rule.local_blocks), *local]


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[4]], ids="-".join)
def test_quantized_caches(
    form: tuple[str, str, str],
    cache_dtype: str,
    page_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choice is that of the keys which the cache gives back."""
    if kernel_device() == "cpu":
        round_to_float8(monkeypatch)
    work = workload_of(form=form, cache_dtype=cache_dtype)
    check(work, page_size=page_size, capacity=64)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_quantized_index_keys(cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one by one, four heads on one key head, as in MiniMax-M3."""
    if kernel_device() == "cpu":
        round_to_float8(monkeypatch)
    shape = {"kernel_size": 1, "kernel_stride": 1, "block_size": 8, "gqa_ratio": 4}
    check(workload_of(form=FORMS[4], cache_dtype=cache_dtype, **shape), (4, 61))


def test_float8_is_refused_where_kernels_cannot_convert_it() -> None:
    work = workload_of("bfloat16", form=FORMS[1], cache_dtype="float8_e4m3fn")
    with pytest.raises(UnsupportedWorkloadError, match="int8 runs on every target"):
        default_schedule(work, KNOWN_TARGETS["cuda:80"])
