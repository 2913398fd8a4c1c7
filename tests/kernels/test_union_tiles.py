"""Selected attention by the unions of neighbours' blocks, on the CPU, its warps in random order."""

from __future__ import annotations

import dataclasses
import os
from types import ModuleType
from typing import Any

import pytest
import torch

from nsagen.cases.base import Sizes
from nsagen.cases.selected_attention import make_case
from nsagen.codegen.template import space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.support import check_case, load_kernel

from .test_pipelines_on_cpu import on_cpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="its plain kernels need the interpreter"
)


def workload(
    dtype: str = "float16",
    group: int = 16,
    dim: int = 64,
    v_dim: int = 64,
    block_size: int = 32,
    **forced: int,
) -> Workload:
    statics = {"head_dim": dim, "v_head_dim": v_dim, "gqa_ratio": group, "block_size": block_size}
    return Workload.of("selected_attention", "forward", dtype=dtype, **statics, **forced)


def union_tiles(w: Workload, **knobs: Any) -> ModuleType:
    default: Any = space_for(w, "union_tiles").default(w, KNOWN_TARGETS["cuda:90"])
    return load_kernel(w, Schedule.of("union_tiles", {**default, **knobs}))


def check(
    monkeypatch: pytest.MonkeyPatch,
    w: Workload,
    seqlens: tuple[int, ...],
    topk_idx: torch.Tensor | None = None,
    *,
    without: str = "",
    any_order: bool = False,
    queries: int | None = None,
    every: bool = True,
    **knobs: Any,
) -> None:
    """Compare with the reference; unless `every` is false, each tile is read as one.

    Few programs take all tiles, so that each has several after each other.
    """
    module = union_tiles(w, **knobs)
    monkeypatch.setattr(module, "unions_pay", lambda *args: every)
    monkeypatch.setattr(module, "processors", lambda x: 2)
    on_cpu(monkeypatch, module, without)
    sizes = Sizes(seqlens, 1, any_order=any_order, queries=queries)
    check_case(module, make_case(w, sizes, "cpu", 1, topk_idx))


@pytest.mark.parametrize("group", [2, 4, 8, 16, 32])
def test_group_sizes(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is 32 tokens to 2, with a bit for each."""
    check(monkeypatch, workload(group=group), (75, 0, 3))


@pytest.mark.parametrize("group", [3, 6])
def test_groups_that_are_padded(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows past the group hold the next group's heads, or nothing, and are not stored."""
    check(monkeypatch, workload(group=group), (40, 9))


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 64), (64, 128), (256, 64), (64, 256)])
def test_head_sizes(dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, workload("bfloat16", 16, dim, v_dim), (40,))


@pytest.mark.parametrize(
    "knobs", [{"step_keys": 32}, {"step_keys": 128}, {"num_stages": 1}], ids=str
)
def test_steps_and_stages(knobs: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, workload(block_size=128), (140,), **knobs)


def test_lists_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats count once, and entries that name no block not at all."""
    check(monkeypatch, workload(), (50, 0, 20), any_order=True)


def test_rows_that_select_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tile with others, and in one where none selects anything."""
    topk_idx = torch.randint(-1, 3, (1, 90, 4), generator=torch.Generator().manual_seed(0))
    topk_idx[:, 5:14] = -1
    check(monkeypatch, workload(), (0, 20, 0, 70), topk_idx.to(torch.int32))


def test_what_follows_a_sequence_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in a block's unused rows may be NaN."""
    w = workload()
    module = union_tiles(w)
    on_cpu(monkeypatch, module)
    case = make_case(w, Sizes((40,), 1), "cpu", 1)
    q, k, v, *rest, scale = case.args
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 24), value=torch.nan) for x in (k, v))
    check_case(module, dataclasses.replace(case, args=(q, k, v, *rest, scale, rest[1], None)))


def of_neighbours(tokens: int) -> torch.Tensor:
    """Lists of which the first half of the tokens share all, and the others nearly nothing."""
    token = torch.arange(tokens)[:, None]
    own = token // 32
    alone = (token * 5 + torch.arange(4) * 7) % (own + 1)
    same = torch.arange(4).expand(tokens, -1)
    return torch.where(token < tokens // 2, same, alone)[None].to(torch.int32)


@pytest.mark.parametrize("union_tenths", [7, 9])
def test_tiles_of_large_unions_are_read_token_by_token(
    union_tenths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    topk_idx = of_neighbours(360)[:, -40:].contiguous()
    topk_idx[:, :20] = torch.arange(4)
    q_start = torch.tensor([320], dtype=torch.int32)
    w = workload(group=16)
    module = union_tiles(w, union_tenths=union_tenths, choice="tile")
    monkeypatch.setattr(module, "unions_pay", lambda *args: False)
    counts = []
    launched = module.attend_apart
    monkeypatch.setattr(
        module, "attend_apart", _Noting(launched, lambda args: counts.append(args[-2].clone()))
    )
    on_cpu(monkeypatch, module)
    whole = make_case(w, Sizes((360,), 1), "cpu", 1)
    q, k, v, _, cu_seqlens, _, _, scale = whole.args
    o, lse = torch.full((40, 16, 64), torch.nan, dtype=q.dtype), torch.full((40, 16), torch.nan)
    few = torch.tensor([0, 40], dtype=torch.int32)
    args = (q[320:], k, v, topk_idx, few, o, lse, scale, cu_seqlens, q_start)
    module.launch(*args)
    expected, expected_lse = _reference(args)
    assert torch.allclose(o.double(), expected, atol=2e-3, rtol=2e-3)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-3)
    assert 0 < (counts[0] < 0).sum() < counts[0].numel() - 1  # both ways were taken


class _Noting:
    """A kernel that shows its arguments before it runs."""

    def __init__(self, kernel: Any, note: Any) -> None:
        self.kernel, self.note = kernel, note

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **named: Any) -> None:
            self.note(args)
            self.kernel[grid](*args, **named)

        return call


def _reference(args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, topk_idx, cu_seqlens, _, _, scale, cu_seqlens_k, q_start = args
    return reference.selected_attention(
        *(x.double() for x in (q, k, v)),
        topk_idx,
        cu_seqlens,
        block_size=32,
        softmax_scale=scale,
        cu_seqlens_k=cu_seqlens_k,
        q_start=q_start,
    )


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(
    ("group", "init_blocks", "local_blocks"), [(16, 1, 2), (8, 1, 2), (16, 0, 1), (16, 2, 3)]
)
def test_starting_from_the_forced_blocks(
    group: int, init_blocks: int, local_blocks: int, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole sequences, and of their last tokens."""
    w = workload(group=group, init_blocks=init_blocks, local_blocks=local_blocks)
    check(monkeypatch, w, (200, 0, 9), every=every, choice="tile")
    check(monkeypatch, w, (150, 9), queries=29, every=every, choice="tile")


@pytest.mark.parametrize(
    "line",
    [
        "mbarrier.wait(k_ring.full.index(place), used // STAGES & 1)",
        "mbarrier.wait(v_ring.full.index(place), used // STAGES & 1)",
        "mbarrier.wait(ring.free.index(place), phase)",
        "mbarrier.arrive(q_ring.free.index(HALF), count=1, pred=step == steps - 1)",
        "mbarrier.arrive(v_ring.free.index(HALF * STAGES + last % STAGES), count=1)",
    ],
)
def test_a_missing_barrier_is_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"changed while|relative|more arrivals|deadlock"):
        check(monkeypatch, workload(), (150,), without=line)
