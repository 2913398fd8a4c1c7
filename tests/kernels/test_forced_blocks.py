"""Sliding-window attention that gives the forced blocks' result beside, on the CPU, its warps in
random order; and selected attention that starts from that result."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Sizes, cases_of, relative_error
from nsagen.cases.sizes import sizes_for
from nsagen.codegen.template import space_for
from nsagen.core.branches import BRANCHES
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import _op, forced_blocks
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.layout import compressed_cu_seqlens
from tests.ops.inputs import STATICS, Packed
from tests.support import check_case, load_kernel

from .test_pipelines_on_cpu import on_cpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="its plain kernels need the interpreter"
)
SM90 = KNOWN_TARGETS["cuda:90"]


def workload(
    window: int = 128,
    block_size: int = 32,
    init_blocks: int = 1,
    local_blocks: int = 2,
    *,
    dtype: str = "float16",
    group: int = 16,
    dim: int = 64,
    v_dim: int = 64,
) -> Workload:
    sizes = {"head_dim": dim, "v_head_dim": v_dim, "gqa_ratio": group, "window_size": window}
    blocks = {"block_size": block_size, "init_blocks": init_blocks, "local_blocks": local_blocks}
    return Workload.of("sliding_window_attention", "forward", dtype=dtype, **sizes, **blocks)


def check(
    monkeypatch: pytest.MonkeyPatch,
    w: Workload,
    seqlens: tuple[int, ...],
    *,
    queries: int | None = None,
    without: str = "",
    **knobs: int,
) -> None:
    """Compare both results with the reference's, for all tokens or the last `queries` of each
    sequence; few programs take all tiles."""
    default: Any = space_for(w, "forced_blocks").default(w, SM90)
    module = load_kernel(w, Schedule.of("forced_blocks", {**default, **knobs}))
    monkeypatch.setattr(module, "processors", lambda x: 2)
    on_cpu(monkeypatch, module, without)
    check_case(module, cases_of(w).make_case(w, Sizes(seqlens, 1, queries=queries), "cpu", 1))


@pytest.mark.parametrize(
    ("window", "block_size", "init_blocks", "local_blocks"),
    [
        (128, 32, 1, 2),  # the window reaches past the local blocks
        (64, 32, 1, 2),  # by less than a block
        (50, 32, 1, 2),  # for some tokens, and less far for others
        (33, 32, 1, 2),  # never: every local block reaches as far
        (20, 32, 0, 2),
        (100, 32, 0, 2),  # no forced blocks but local ones
        (130, 16, 3, 4),  # several first blocks, and steps of several blocks
        (100, 128, 1, 1),
        (1, 32, 0, 1),
        (1000, 24, 2, 3),  # blocks that steps do not tile
        (40, 32, 5, 4),  # more forced blocks than most tokens have
    ],
)
def test_windows_and_forced_blocks(
    window: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(monkeypatch, workload(window, block_size, init_blocks, local_blocks), (150, 0, 9, 70))


@pytest.mark.parametrize("group", [1, 4, 64])
def test_group_sizes(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of 128 tokens to 2: it lies in several blocks, or in one."""
    check(monkeypatch, workload(70, group=group), (140, 0, 3) if group < 64 else (90,))


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 64), (64, 128), (128, 128)])
def test_head_sizes(dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, workload(dtype="bfloat16", dim=dim, v_dim=v_dim), (100,))


@pytest.mark.parametrize("knobs", [{"block_n": 128}, {"num_stages": 2}], ids=str)
def test_steps_and_stages(knobs: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, workload(200), (300,), **knobs)


@pytest.mark.parametrize(
    "blocks", [(128, 32, 1, 2), (50, 32, 1, 2), (33, 32, 1, 2), (20, 32, 0, 2), (1000, 24, 2, 3)]
)
def test_pieces(blocks: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that begin anywhere in their sequences, whose keys are all those up to their end."""
    check(monkeypatch, workload(*blocks), (190, 0, 9, 77), queries=37)


@pytest.mark.parametrize("tokens", [9, 40, 90])
@pytest.mark.parametrize(
    "blocks", [(128, 32, 1, 2), (50, 32, 1, 2), (1000, 24, 2, 3), (20, 32, 0, 2)]
)
def test_what_follows_a_sequence_is_not_read(
    blocks: tuple[int, int, int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values past the last token may be NaN, wherever a step ends."""
    w = workload(*blocks)
    module = load_kernel(w, Schedule.of("forced_blocks", dict(space_for(w).default(w, SM90))))
    on_cpu(monkeypatch, module)
    case = cases_of(w).make_case(w, Sizes((tokens,), 1), "cpu", 1)
    q, k, v, cu_seqlens, *rest, _, _, o_forced, lse_forced = case.args
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 64), value=torch.nan) for x in (k, v))
    args = (q, k, v, cu_seqlens, *rest, cu_seqlens, None, o_forced, lse_forced)
    check_case(module, dataclasses.replace(case, args=args))


@pytest.mark.parametrize(
    "line",
    [
        "mbarrier.wait(k_ring.full.index(slot), used // STAGES & 1)",
        "mbarrier.wait(v_ring.full.index(slot), used // STAGES & 1)",
        "mbarrier.wait(ring.free.index(place), phase)",
        "mbarrier.arrive(q_ring.free.index(HALF), count=1, pred=step == steps - 1)",
        "mbarrier.arrive(v_ring.free.index(used % STAGES), count=1)",
    ],
)
def test_a_missing_barrier_is_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"changed while|relative|more arrivals|deadlock"):
        check(monkeypatch, workload(), (300,), without=line)


@pytest.mark.parametrize(
    ("orientation", "dtype", "group", "block_size", "init_blocks", "local_blocks"),
    [
        ("rows", "float32", 2, 16, 1, 2),
        ("columns", "float16", 5, 16, 0, 1),
        ("rows", "float16", 3, 24, 1, 1),  # one step of 32 keys a block
        ("columns", "float32", 1, 16, 3, 4),
    ],
)
def test_query_major_from_the_forced_blocks(
    orientation: str, dtype: str, group: int, block_size: int, init_blocks: int, local_blocks: int
) -> None:
    """Of whole sequences, and of their last tokens."""
    sizes = {"head_dim": 24, "v_head_dim": 16, "gqa_ratio": group, "block_size": block_size}
    forced = {"init_blocks": init_blocks, "local_blocks": local_blocks}
    w = Workload.of("selected_attention", "forward", dtype=dtype, **sizes, **forced)
    default: Any = space_for(w, "query_major").default(w, SM90)
    knobs = {**default, "orientation": orientation}
    module = load_kernel(w, Schedule.of("query_major", knobs))
    for queries in (None, 20):
        sizes = Sizes((75, 0, 3), 1, queries=queries)
        check_case(module, cases_of(w).make_case(w, sizes, "cpu", 1))


def test_the_gated_sum_with_other_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both algorithms' epilogues, with gates of both signs, and 0."""
    statics = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 16, "block_size": 32}
    forced = {"init_blocks": 1, "local_blocks": 2}
    w = Workload.of("selected_attention", "forward", dtype="float16", **statics, **forced)
    for algorithm in ("query_major", "union_tiles"):
        schedule = Schedule.of(algorithm, dict(space_for(w, algorithm).default(w, SM90)))
        module = load_kernel(w, schedule)
        on_cpu(monkeypatch, module)
        case = cases_of(w).make_case(w, Sizes((130, 3), 1), "cpu", 1)
        shape = case.outputs["o"].shape
        torch.manual_seed(2)
        compressed, sliding = (torch.randn(shape, dtype=torch.float16) for _ in range(2))
        gate = torch.randn(*shape[:2], 3, dtype=torch.float16)
        gate[::3, ::2] = 0.0

        def expected(case=case, compressed=compressed, sliding=sliding, gate=gate):
            right = case.expected()
            g = gate.double()
            o = g[..., :1] * compressed + g[..., 1:2] * right["o"] + g[..., 2:] * sliding
            return {**right, "o": o}

        args = (*case.args, compressed, sliding, gate)
        check_case(module, dataclasses.replace(case, args=args, expected=expected))


# Of different sizes: a second call that looks like the first would repeat its launches.
@pytest.mark.parametrize(
    ("algorithm", "tokens", "before"),
    [("query_major", 70, 0), ("union_tiles", 90, 0), ("union_tiles", 60, 45)],
)
def test_through_the_ops(
    algorithm: str, tokens: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """native_sparse_attention's branches, with both kernels in the dispatcher's place; in a chunk,
    after so many tokens of the last sequence, too."""
    usual, loaded = _op.find_kernel, []

    def find(dispatcher: str, op: str, pass_: str, params: Any, *more: Any) -> Any:
        if not params.get("local_blocks") or op == "block_selection":
            return usual(dispatcher, op, pass_, params, *more)
        w = Workload.of(op, pass_, dtype="float16", **params)
        name = algorithm if op == "selected_attention" else "forced_blocks"
        module = load_kernel(w, Schedule.of(name, dict(space_for(w, name).default(w, SM90))))
        on_cpu(monkeypatch, module)
        loaded.append(str(w))
        return module.launch

    x = Packed(
        torch.float16,
        (0, 5, before + tokens),
        query_heads=32,
        kv_heads=2,
        head_dim=64,
        v_head_dim=64,
    )
    chunk: dict[str, Any] = {}
    cu_seqlens, rows = x.cu_seqlens, torch.arange(x.q.shape[0])
    if before:
        rows = rows[(rows < 5) | (rows >= 5 + before)]
        chunk = {"cu_seqlens_k": cu_seqlens, "q_start": torch.tensor([0, 0, before]).int()}
        cu_seqlens = torch.tensor([0, 0, 5, 5 + tokens]).int()
    statics = {**STATICS, "block_size": 32, "topk": 3, "local_blocks": 1, "window_size": 40}
    offsets = compressed_cu_seqlens(x.cu_seqlens, 8, 4)
    ck, cv = (x.randn(int(offsets[-1]), 2, 64) for _ in range(2))

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, ck, cv, gate = tensors
        return attend_branches(
            *(q, (ck, cv), (k, v), (k, v), gate),
            cu_seqlens=cu_seqlens,
            window_cu_seqlens=offsets,
            branches=BRANCHES,
            softmax_scale=0.125,
            **statics,
            **chunk,
        )

    tensors = (x.q[rows], x.k, x.v, ck, cv, x.gate[rows])
    expected = attend(*(t.double() for t in tensors))
    monkeypatch.setattr(forced_blocks, "has_kernel", lambda *args: True)
    monkeypatch.setattr(_op, "find_kernel", find)
    assert relative_error(attend(*tensors), expected) <= THRESHOLDS[torch.float16]
    assert [name.split()[0] for name in loaded] == [
        "sliding_window_attention",
        "selected_attention",
    ]


@pytest.mark.parametrize("window", [True, False], ids=["sliding", "selected"])
def test_inputs_of_verify_and_tuning(window: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of blocks is as block selection writes it, which the kernel relies on."""
    w = workload(40, local_blocks=1)
    if not window:
        statics = {"head_dim": 64, "v_head_dim": 64, "gqa_ratio": 16, "block_size": 32}
        w = Workload.of(
            *("selected_attention", "forward"),
            dtype="float16",
            **statics,
            init_blocks=1,
            local_blocks=1,
        )
    algorithm = "forced_blocks" if window else "query_major"
    module = load_kernel(w, space_for(w, algorithm).default_schedule(w, SM90))
    on_cpu(monkeypatch, module)
    sizes = dataclasses.replace(sizes_for(w), seqlens=(0, 7, 100), kv_heads=1)
    check_case(module, cases_of(w).make_case(w, sizes, "cpu"))


def test_what_has_no_algorithm_is_refused() -> None:
    """Without local blocks, or with sizes that the pipeline lacks, nothing covers the workload."""
    w = workload(dtype="float32")
    with pytest.raises(UnsupportedWorkloadError, match="needs an algorithm that covers it"):
        space_for(w)
    none = workload(init_blocks=1, local_blocks=0)
    with pytest.raises(UnsupportedWorkloadError, match="forced_blocks"):
        space_for(none, "forced_blocks")
