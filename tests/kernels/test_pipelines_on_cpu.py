"""The pipelines on the CPU, their warps in random order.

On a GPU a missing barrier shows by chance alone, and without one Gluon only compiles.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.experimental.gluon._runtime import GluonJITFunction

from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.codegen.template import space_for, spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Param, Schedule, Workload
from tests.gluon_on_cpu import Pipeline
from tests.kernels import test_ranges as ranges
from tests.kernels.test_gated_gradients import check_gates
from tests.support import check_case, load_kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="its plain kernels need the interpreter"
)


def pipeline(
    op: str, sizes: tuple[str, int, int, int], knobs: dict[str, int], **statics: int
) -> tuple[Workload, ModuleType]:
    """A workload of dtype, group, head_dim and v_head_dim, and its kernels."""
    dtype, group, dim, v_dim = sizes
    params = {"head_dim": dim, "v_head_dim": v_dim, "gqa_ratio": group, **statics}
    w = Workload.of(op, "backward", dtype=dtype, **params)
    (space,) = (s for s in spaces_of(op, w.pass_) if s.algorithm == "warp_specialized")
    default: dict[str, Any] = dict(space.default(w, KNOWN_TARGETS["cuda:90"]))
    return w, load_kernel(w, Schedule.of(space.algorithm, {**default, **knobs}))


def variant(w: Workload, **knobs: Param) -> ModuleType:
    """A workload's pipeline with some knobs changed."""
    default = space_for(w, "warp_specialized").default_schedule(w, KNOWN_TARGETS["cuda:90"])
    return load_kernel(w, Schedule.of("warp_specialized", dict(default.knobs), **knobs))


def on_cpu(monkeypatch: pytest.MonkeyPatch, module: ModuleType, without: str = "") -> None:
    """Let a module's launch run its pipelines here, without one of their lines."""
    assert module.__file__
    path = Path(module.__file__)
    kernels = (n for n, f in vars(module).items() if isinstance(f, GluonJITFunction))
    for name in [n for n in kernels if "__" in n]:
        monkeypatch.setattr(module, name, Pipeline(path, name, without=without))


@pytest.mark.parametrize("sizes", [("bfloat16", 16, 64, 64), ("float16", 4, 64, 128)], ids=str)
@pytest.mark.parametrize(
    ("op", "statics"),
    [
        ("compressed_attention", {"kernel_size": 8, "kernel_stride": 4}),
        ("sliding_window_attention", {"window_size": 40}),
    ],
)
def test_two_passes(
    op: str, statics: dict[str, int], sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, module = pipeline(op, sizes, {}, **statics)
    on_cpu(monkeypatch, module)
    check_case(module, cases_of(w).make_case(w, Sizes((70, 0, 3), 1), "cpu", 1))


WINDOWS = {"kernel_size": 8, "kernel_stride": 4}


@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 64)])
def test_selection(group: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of up to three steps of 128 windows, two a turn of the loop for groups of 16."""
    statics = {"block_size": 16, "topk": 6, "init_blocks": 1, "local_blocks": 2}
    statics |= {"kernel_size": 2, "kernel_stride": 1, "head_dim": dim, "gqa_ratio": group}
    w = Workload.of("block_selection", "forward", dtype="bfloat16", **statics)
    module = variant(w, num_stages=2)
    on_cpu(monkeypatch, module)
    check_case(module, cases_of(w).make_case(w, Sizes((300, 0, 5), 1), "cpu", 1))


@pytest.mark.parametrize("ranges", [1, 3])
def test_stored_ds(ranges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dq from what the pass of dk and dv stored of one range of tokens after the other."""
    module = stored_ds(monkeypatch, 16)
    w = module.workload
    case = cases_of(w).make_case(w, Sizes((300, 0, 5, 75), 2), "cpu", 1)
    if ranges > 1:
        monkeypatch.setattr(module, "WORKSPACE", 2 * 2 * 16 * 128 * (128 + 8))
    check_case(module, case)


def test_stored_ds_of_one_sequence_takes_the_windows_that_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = stored_ds(monkeypatch, 16)
    w = module.workload
    budget = 16 * 128 * (256 + 8)
    made = list(module.ranges_of(1200, budget, 384, causal=True))
    assert [first for first, _, _ in made] == [0, *(end for _, end, _ in made[:-1])]
    assert 0 <= made[-1][1] - 1200 < 16 * 8
    for first, end, windows in made:
        assert min(end // 4, 384) <= windows <= 384
        assert (end - first + 8) * 16 * windows <= budget or end - first == 128
    monkeypatch.setattr(module, "WORKSPACE", 2 * 2 * 16 * 128 * (256 + 8))
    check_case(module, cases_of(w).make_case(w, Sizes((600,), 2), "cpu", 1))


def test_stored_ds_is_added_to_dq(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stored_ds(monkeypatch, 8)
    case = cases_of(module.workload).make_case(module.workload, Sizes((50, 0, 3), 1), "cpu", 1)
    dq = case.outputs["dq"]
    before = torch.randn_like(dq)
    dq.copy_(before)
    module.launch(*case.args, add=True)
    assert relative_error(dq, case.expected()["dq"] + before.double()) <= THRESHOLDS[dq.dtype]


def test_stored_ds_of_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stored_ds(monkeypatch, 8)
    check_gates(module.workload, module)


def stored_ds(monkeypatch: pytest.MonkeyPatch, group: int) -> Any:
    """float16, because the product of plain Triton runs in the interpreter."""
    heads = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": group}
    w = Workload.of("compressed_attention", "backward", dtype="float16", **heads, **WINDOWS)
    schedule = space_for(w, "stored_ds").default_schedule(w, KNOWN_TARGETS["cuda:90"])
    module = load_kernel(w, schedule)
    on_cpu(monkeypatch, module)
    monkeypatch.setattr(module, "workload", w, raising=False)
    return module


@pytest.mark.parametrize("hide", ["gradients", "scores"])
@pytest.mark.parametrize(
    ("op", "statics"),
    [("compressed_attention", WINDOWS), ("sliding_window_attention", {"window_size": 40})],
)
def test_gates_of_any_sign(
    op: str, statics: dict[str, int], hide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask by the sign of p took rows of negative gates out of dk: p is multiplied by them."""
    heads = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 8}
    w = Workload.of(op, "backward", dtype="float16", **heads, **statics)
    module = variant(w, hide=hide)
    on_cpu(monkeypatch, module)
    check_gates(w, module)


@pytest.mark.parametrize(("query", "offset"), [(0.5, 60.0), (4.0, 6e4)], ids=["-7.5", "-6e4"])
@pytest.mark.parametrize(
    ("op", "forward"),
    [
        ("compressed_attention", "row_tiles"),
        ("selected_attention", "query_major"),
        ("sliding_window_attention", "row_tiles"),
    ],
)
def test_float16_gradients_of_a_scaled_loss(
    op: str, forward: str, query: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As test_ranges.py has it for plain kernels: a loss scale of 2**15, scores down to -6e4."""
    monkeypatch.setitem(ranges.STATICS, "selected_attention", {"block_size": 64})
    sizes = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 8}
    on_cpu(monkeypatch, ranges.kernel(op, "backward", "warp_specialized", "float16", **sizes))
    torch.manual_seed(1)
    keys = (ranges.TOKENS - 8) // 4 + 1 if op == "compressed_attention" else ranges.TOKENS
    q, do = torch.randn(2, ranges.TOKENS, 8, 64)
    k, v = torch.randn(2, keys, 1, 64)
    q, k = (8 * q).round() / 8, (8 * k).round() / 8  # so that scores are exact
    q[..., 0], k[..., 0] = query, -offset
    tensors = tuple(x.half() for x in (q, k, v, do * 2.0**15 / 64))
    exact = ranges.by_torch(op, torch.float64, *tensors)
    found = ranges.by_kernels(op, forward, "warp_specialized", *tensors)
    for x, wanted in zip(found, exact, strict=True):
        assert x.isfinite().all()
        ignored = int(wanted is exact[1] and offset == 6e4)  # as there: the rounding of ds is left
        assert ranges.error(x[..., ignored:], wanted[..., ignored:]) < 1e-2


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
    sizes = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 8}
    on_cpu(monkeypatch, ranges.kernel(op, "backward", algorithm, "float16", **sizes))
    ranges.check_large_ds(op, forward, algorithm)


@pytest.mark.parametrize("seed", [10, 15])
def test_forced_blocks_that_weigh_the_same_beside_huge_scores(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the best keys of the two parts of the forced blocks are several with the same score of
    1e9, whose ulp is 64: a logarithm of their sums would not tell two keys from one."""
    params = {"head_dim": 128, "v_head_dim": 64, "gqa_ratio": 2, "window_size": 12}
    blocks = {"block_size": 16, "init_blocks": 1, "local_blocks": 2}
    w = Workload.of("sliding_window_attention", "forward", dtype="bfloat16", **params, **blocks)
    (space,) = (s for s in spaces_of(w.op, w.pass_) if s.algorithm == "forced_blocks")
    module = load_kernel(w, space.default_schedule(w, KNOWN_TARGETS["cuda:90"]))
    on_cpu(monkeypatch, module)
    draw = torch.randn
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", lambda *a, **k: 1e4 * draw(*a, **k).sign())
        case = cases_of(w).make_case(w, Sizes((0, 3, 18)), "cpu", seed)
    check_case(module, case)


def check_selected(
    monkeypatch: pytest.MonkeyPatch,
    seqlens: tuple[int, ...] = (70, 3),
    sizes: tuple[str, int, int, int] = ("bfloat16", 16, 64, 64),
    *,
    block_size: int = 64,
    topk_idx: torch.Tensor | None = None,
    gate: float | None = None,
    shares_bytes: int = 1 << 30,
    without: str = "",
    **knobs: int,
) -> None:
    """Compare selected attention's gradients with the reference's.

    Args:
        gate: of all rows, by which do is yet to be multiplied; with delta instead of o.
        without: a line of the kernel that is left out.
    """
    w, module = pipeline("selected_attention", sizes, knobs, block_size=block_size)
    on_cpu(monkeypatch, module, without)
    monkeypatch.setattr(module, "SHARES_BYTES", shares_bytes)
    case = cases_of(w).make_case(w, Sizes(seqlens, 1), "cpu", 1, topk_idx)
    if gate is not None:
        do, *middle, o, lse, dq, dk, dv, scale = case.args
        delta = (do.float() * o.float()).sum(-1)
        args = (do / gate, *middle, None, lse, dq, dk, dv, scale, delta / gate)
        case = dataclasses.replace(case, args=(*args, torch.full_like(lse, gate)))
    check_case(module, case)


@pytest.mark.parametrize(
    ("tokens", "sizes", "knobs"),
    [
        (70, ("bfloat16", 16, 64, 64), {}),
        (66, ("bfloat16", 16, 128, 64), {"row_stages": 2}),
        (20, ("float16", 16, 128, 128), {}),  # shares of float32, in copies of 32 columns
        (70, ("float16", 8, 64, 64), {"row_stages": 6}),  # a step's copies in two turns
        (18, ("bfloat16", 64, 64, 64), {"part_tokens": 16}),  # a token a step, parts of a list
    ],
    ids=str,
)
def test_selected_gradients(
    tokens: int, sizes: Any, knobs: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_selected(monkeypatch, (tokens, 3), sizes, **knobs)


def test_some_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of tokens add their sums to those before, blocks of one part and of several."""
    token = torch.arange(200)
    topk_idx = torch.stack([token * 0, torch.where(token > 140, token // 64, -1)], 1)[None]
    limit = 80 * 2 * 16 * 64 * 2
    check_selected(monkeypatch, (200,), topk_idx=topk_idx, shares_bytes=limit, part_tokens=64)


def test_rows_that_see_nothing_and_blocks_that_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Empty sequences, -1, blocks of the future, and repeats, which count once."""
    topk_idx = torch.randint(-1, 3, (1, 90, 4), generator=torch.Generator().manual_seed(0))
    topk_idx[:, 5:9] = -1
    check_selected(monkeypatch, (0, 20, 0, 70), topk_idx=topk_idx)


@pytest.mark.parametrize("block_size", [128, 192])
def test_blocks_of_several_tiles(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MSA's blocks of 128 keys, of which a token may see a part of the first tile alone."""
    numbers = [[0, 1, -1], [2**31 - 1, 0, 0], [2**30, 1, -(2**31)]]
    topk_idx = torch.tensor(numbers).repeat(60, 1)[None, :170]
    check_selected(monkeypatch, (150, 0, 20), block_size=block_size, topk_idx=topk_idx)


def test_a_gate_and_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    check_selected(monkeypatch, (10,), gate=0.25)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mbarrier.wait(memory.pair_free, step // 2 & 1 ^ 1)", "changed while it|relative"),
        ("mbarrier.wait(memory.pair_full, step // 2 & 1)", "changed while it|relative"),
        ("mbarrier.arrive(memory.pair_free, count=1)", "deadlock"),
        ("mbarrier.wait(memory.q_full.index(slot), filled)", "changed while it|relative"),
        ("mbarrier.arrive(memory.rows_free.index(first_slot + 1), count=1)", "deadlock"),
        (
            "mbarrier.wait(memory.rows_free.index(slot), step // ROW_STAGES & 1 ^ 1)",
            "changed|more|rel",
        ),
        ("tma.store_wait((SHARE_PLACES - 1) * COPIES)", "relative"),
    ],
)
def test_a_missing_barrier_is_seen(line: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=found):
        check_selected(monkeypatch, without=line)
