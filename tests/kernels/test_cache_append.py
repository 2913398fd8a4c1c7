"""Appending one token a row to the caches, against the float64 reference."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Case, Sizes, relative_error
from nsagen.cases.cache_append import make_case
from nsagen.codegen.template import default_schedule
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import (
    BRANCH_KV,
    CACHE_DTYPES,
    COMPRESS_TYPES,
    Param,
    Schedule,
    Workload,
)
from nsagen.ops import reference
from tests.float8_interpreter import round_to_float8
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

DTYPES = kernel_dtypes()
POOLS = ("avgpool", "weightedpool", "sigmoid_mul")
EDGES = (-1, 0, 3, 6, 7, 8, 11, -1, 12, 15, 40, 63)  # size 8, stride 4: some complete a window


def workload(kind: str = "weightedpool", dtype: str = "float32", **params: Param) -> Workload:
    usual = {
        "compress_type": kind,
        "head_dim": 16,
        "v_head_dim": 16,
        "gqa_ratio": 2,
        "kernel_size": 8,
        "kernel_stride": 4,
        "with_pe": True,
        "mlp_hidden": 24,
    }
    return Workload.of("cache_append", "decode", dtype=dtype, **{**usual, **params})


def schedule(work: Workload, **knobs: Param) -> Schedule:
    """The default schedule but for some knobs."""
    usual = default_schedule(work, KNOWN_TARGETS["cuda:90"])
    return Schedule.of(usual.algorithm, dict(usual.knobs) | knobs)


def case_of(
    work: Workload,
    positions: tuple[int, ...] = EDGES,
    kv_heads: int = 2,
    page_size: int | None = None,
) -> Case:
    sizes = Sizes(positions, kv_heads, capacity=64, page_size=page_size)
    return make_case(work, sizes, kernel_device())


def check(work: Workload, *args: object, **knobs: Param) -> None:
    check_case(load_kernel(work, schedule(work, **knobs)), case_of(work, *args))


@pytest.mark.parametrize("with_pe", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_positions_at_every_edge(kind: str, dtype: str, with_pe: bool) -> None:
    """Around windows' ends; idle rows in between; the cache's last token."""
    check(workload(kind, dtype, with_pe=with_pe))


@pytest.mark.parametrize("page_size", [4, 16, 32])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_pages(kind: str, page_size: int) -> None:
    """Windows that lie in one page, and that cross into the next."""
    check(workload(kind), EDGES, 2, page_size)


@pytest.mark.parametrize("gqa_ratio", [1, 3, 16, 17])
def test_group_sizes(gqa_ratio: int) -> None:
    check(workload(gqa_ratio=gqa_ratio), (7, 2, 31), 3)


@pytest.mark.parametrize("dims", [(24, 24), (80, 40), (64, 128), (192, 16), (128, 128)])
@pytest.mark.parametrize("kind", ["weightedpool", "linear", "sigmoid_mul", "mlp"])
def test_head_dims(kind: str, dims: tuple[int, int]) -> None:
    check(workload(kind, "float16", head_dim=dims[0], v_head_dim=dims[1]), (7, -1, 30, 43))


@pytest.mark.parametrize(("size", "stride"), [(32, 16), (4, 4), (1, 1), (12, 4), (20, 2), (32, 1)])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_windows_of_any_size_and_stride(kind: str, size: int, stride: int) -> None:
    work = workload(kind, kernel_size=size, kernel_stride=stride)
    check(work, (0, size - 2, size - 1, size, size + stride - 1, size + 2 * stride - 1))


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("kind", ["avgpool", "linear", "mlp"])
def test_all_rows_complete_a_window_or_none(kind: str, rows: int) -> None:
    check(workload(kind), (31,) * rows)
    check(workload(kind), (30,) * rows)


def test_only_idle_rows_change_nothing() -> None:
    for kind in COMPRESS_TYPES:
        check(workload(kind), (-1, -1, -1))


@pytest.mark.parametrize(("block_heads", "num_warps"), [(1, 1), (4, 2), (64, 4)])
@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_schedules(kind: str, block_heads: int, num_warps: int) -> None:
    work = workload(kind, head_dim=64, v_head_dim=64, gqa_ratio=5)
    check(work, (7, 30, 43), block_heads=block_heads, num_warps=num_warps)


@pytest.mark.parametrize(("columns", "block_rows"), [(32, 16), (64, 32)])
def test_schedules_of_matmul(columns: int, block_rows: int) -> None:
    work = workload("linear", "float16", head_dim=48, v_head_dim=80)
    check(work, (7, 2, 11, -1, 15) * 8, columns=columns, block_rows=block_rows)


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_strided_views(kind: str) -> None:
    """q, k and v as slices of one projection; caches with heads before tokens, or wider."""
    work = workload(kind)
    case = case_of(work)
    args = list(case.args)
    args[:3] = torch.cat(args[:3], 1).split([4, 2, 2], 1)
    for index, name in ((10, "k_cache"), (12, "ck_cache"), (14, "k_raw")):
        args[index] = case.outputs[name] = args[index].transpose(1, 2).contiguous().transpose(1, 2)
    for index, name in ((11, "v_cache"), (13, "cv_cache")):
        wider = torch.cat((args[index], args[index]), -1)[..., :16]
        args[index] = case.outputs[name] = wider
    check_case(load_kernel(work), dataclasses.replace(case, args=tuple(args)))


PAIRS = [("mlp", "avgpool"), ("weightedpool", "mlp"), ("sigmoid_mul", "linear"), ("mlp", "mlp")]


@pytest.mark.parametrize("branch_kv", BRANCH_KV)
@pytest.mark.parametrize(
    ("kind", "v_kind"),
    [
        pytest.param(*pair, marks=[] if pair in PAIRS else pytest.mark.slow)
        for pair in itertools.product(COMPRESS_TYPES, repeat=2)
    ],
)
def test_values_of_another_type(kind: str, v_kind: str, branch_kv: str) -> None:
    """Keys and values of any two types, of any two sizes, with embeddings of their own."""
    more = {"v_compress_type": v_kind, "v_with_pe": True, "branch_kv": branch_kv}
    check(workload(kind, v_head_dim=24, **more), (7, -1, 2, 11, 30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("kind", ["mlp", "sigmoid_mul"])
def test_separate_branches(kind: str, page_size: int | None, dtype: str) -> None:
    check(workload(kind, dtype, branch_kv="separate"), EDGES, 2, page_size)


@pytest.mark.parametrize("hidden", [8, 16, 136, 200])
def test_hidden_sizes(hidden: int) -> None:
    check(workload("mlp", "float16", mlp_hidden=hidden), (7, 11, 30, 43))


def test_strided_views_of_separate_branches() -> None:
    """Rows as slices of one projection; caches with heads before tokens."""
    work = workload("mlp", branch_kv="separate")
    case = case_of(work)
    args = list(case.args)
    rows = [args[1], args[2], *args[20:24]]  # k, v and the branches' own, of one head size
    args[1], args[2], *args[20:24] = torch.cat(rows, 1).split(2, 1)
    for index, name in ((24, "v_raw"), (25, "k_window_cache"), (26, "v_window_cache")):
        args[index] = case.outputs[name] = args[index].transpose(1, 2).contiguous().transpose(1, 2)
    check_case(load_kernel(work), dataclasses.replace(case, args=tuple(args)))


@pytest.mark.parametrize("kind", COMPRESS_TYPES)
def test_a_sequence_grows_token_by_token(kind: str) -> None:
    """Caches as a step left them serve the next one."""
    work = workload(kind, kernel_size=8, kernel_stride=2)
    statics = {"compress_type": kind, "kernel_size": 8, "kernel_stride": 2}
    launch = load_kernel(work).launch
    caches = case_of(work, (0,)).args[10:15]
    for position in range(24):
        q, k, v, *tables, w_k, w_v, pe = case_of(work, (position,)).args[:8]
        positions, slots, *_, q_out, table = case_of(work, (position,)).args[8:17]
        second = case_of(work, (position,)).args[17:]
        new = [x * (1 + position) for x in (q, k, v)]
        expected = [cache.double() for cache in caches]
        weights = [None if w is None else w.double() for w in (w_k, w_v)]
        if second:
            weights = [(w, w2.double()) for w, w2 in zip(weights, second, strict=False)]
        wide = [x.double() for x in (*new, *tables)]
        reference.cache_append(*wide, *weights, pe.double(), positions, slots, *expected, **statics)
        launch(*new, *tables, w_k, w_v, pe, positions, slots, *caches, q_out, table, *second)
        for cache, right in zip(caches, expected, strict=True):
            assert relative_error(cache, right) <= THRESHOLDS[cache.dtype]


def test_a_wrong_call_is_refused() -> None:
    work = workload()
    args = list(case_of(work).args)
    launch = load_kernel(work).launch
    with pytest.raises(ValueError, match="needs both"):
        launch(*args[:5], None, *args[6:])
    with pytest.raises(ValueError, match="with a position embedding"):
        launch(*args[:7], None, *args[8:])
    args[1] = args[1].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"k: the last dimension must be contiguous, got \("):
        launch(*args)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("kind", POOLS)
def test_quantized_caches(
    kind: str, cache_dtype: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's numbers and scale, to the bit; compressed rows are made of exact tokens."""
    if kernel_device() == "cpu":
        round_to_float8(monkeypatch)
    work = workload(kind, cache_dtype=cache_dtype, head_dim=24, v_head_dim=40)
    check(work, EDGES, 2, page_size)


def test_rows_that_no_scale_fits() -> None:
    """Zeros stay zeros, tiny and huge rows keep their size, and a NaN spoils its own row alone."""
    work = workload("avgpool", with_pe=False, cache_dtype="int8")
    case = case_of(work, (0, 1, 2, 3))
    k, v, k_scale, v_scale = case.args[1], case.args[2], *case.args[-4:-2]
    for x in (k, v):
        x[0] = 0.0
        x[1] *= 1e-30
        x[2] *= 1e30
        x[3, 0, 5] = float("nan")
    load_kernel(work).launch(*case.args)
    slots = case.args[9].tolist()
    for rows, scale in ((case.args[10], k_scale), (case.args[11], v_scale)):
        for row, slot in enumerate(slots[:3]):
            kept = reference.dequantize(rows[slot, row], scale[slot, row])
            largest = kept.abs().amax(-1)
            assert kept.isfinite().all()
            assert bool((largest > 0).all()) == (row > 0)
        assert torch.equal(scale[slots[3], 3].isnan().cpu(), torch.tensor([True, False]))


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_products_into_quantized_caches(
    kind: str, cache_dtype: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs share a row's columns; a kernel after them knows the whole row, and its scale."""
    if kernel_device() == "cpu":
        round_to_float8(monkeypatch)
    check(workload(kind, cache_dtype=cache_dtype, head_dim=24, v_head_dim=40), EDGES, 2, page_size)


@pytest.mark.parametrize("kinds", [("linear", "avgpool"), ("avgpool", "mlp")], ids="-".join)
def test_one_side_of_quantized_caches_is_a_product(kinds: tuple[str, str]) -> None:
    work = workload(kinds[0], v_compress_type=kinds[1], cache_dtype="int8")
    check(work, EDGES, 2)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "hip:gfx942"])
def test_float8_is_refused_where_kernels_cannot_convert_it(target: str) -> None:
    work = workload("avgpool", cache_dtype="float8_e4m3fn")
    with pytest.raises(UnsupportedWorkloadError, match="int8 runs on every target"):
        default_schedule(work, KNOWN_TARGETS[target])
    default_schedule(workload("avgpool", cache_dtype="int8"), KNOWN_TARGETS[target])
