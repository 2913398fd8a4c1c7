"""Forced blocks met once, on the reference: the same attention by another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsagen.core.branches import BRANCHES
from nsagen.core.errors import InvalidInputError
from nsagen.ops import forced_blocks, reference
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.gated_attention import branches_forward
from nsagen.ops.layout import compressed_cu_seqlens

from .chunks import cut, cuts
from .dense import PROPERTY
from .inputs import STATICS, Packed

BLOCKS = {name: STATICS[name] for name in ("block_size", "init_blocks", "local_blocks")}


def inputs() -> tuple[Any, ...]:
    x = Packed(torch.float64)
    offsets = compressed_cu_seqlens(x.cu_seqlens, STATICS["kernel_size"], STATICS["kernel_stride"])
    ck = x.randn(int(offsets[-1]), x.kv_heads, x.head_dim)
    cv = x.randn(int(offsets[-1]), x.kv_heads, x.v_head_dim)
    return x.q, x.k, x.v, ck, cv, x.gate, x.cu_seqlens, offsets


def attend(args: tuple[Any, ...], **more: Any) -> torch.Tensor:
    q, k, v, ck, cv, gate, cu_seqlens, offsets = args
    return attend_branches(
        *(q, (ck, cv), (k, v), more.pop("sliding", (k, v)), gate),
        cu_seqlens=cu_seqlens,
        window_cu_seqlens=offsets,
        softmax_scale=0.2,
        window_size=9,
        **{"branches": BRANCHES, **STATICS, **more},
    )


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if there were kernels for it; lists the ops that ran."""
    ran: list[str] = []
    for name in ("window_and_forced_blocks", "free_blocks_attention", "free_blocks_gated_sum"):
        op = getattr(forced_blocks, name)

        def noted(*args: Any, op: Any = op, name: str = name) -> Any:
            ran.append(name)
            return op(*args)

        monkeypatch.setattr(forced_blocks, name, noted)
    monkeypatch.setattr(forced_blocks, "has_kernel", lambda *args: True)
    return ran


def test_the_gated_sum_is_the_same(once: list[str]) -> None:
    args = inputs()
    found = attend(args)
    assert once == ["window_and_forced_blocks", "free_blocks_gated_sum"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forced_blocks, "has_kernel", lambda *args: False)
        torch.testing.assert_close(found, attend(args), rtol=1e-10, atol=1e-12)


def test_what_training_keeps_is_the_same(once: list[str]) -> None:
    """o and lse of each branch: the backward pass needs nothing else."""
    statics = tuple(STATICS.values())
    args = (*inputs(), *statics, 9, 0.2)
    assert list(STATICS)[:2] == ["kernel_size", "kernel_stride"]
    found = branches_forward(*args)
    assert once == ["window_and_forced_blocks", "free_blocks_attention"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forced_blocks, "has_kernel", lambda *args: False)
        for a, b in zip(found, branches_forward(*args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@PROPERTY
@given(cuts(40), *(st.integers(low, high) for low, high in ((1, 40), (1, 9), (0, 3), (1, 3))))
def test_pieces_give_what_whole_sequences_do(
    batch: list[list[int]], window: int, block_size: int, init_blocks: int, local_blocks: int
) -> None:
    """In both branches, and by either way."""
    rule = {"block_size": block_size, "init_blocks": init_blocks, "local_blocks": local_blocks}
    x = Packed(torch.float64, tuple(sequence[-1] for sequence in batch))
    positions = reference.positions_in_sequence(x.cu_seqlens, x.q.shape[0])
    own, most = positions[:, None] // block_size, 1 << 20
    forced = reference.forced_blocks(positions, **rule).expand(x.kv_heads, -1, -1)
    free = torch.rand(x.kv_heads, x.q.shape[0], 1 + 40 // block_size).argsort(-1)[..., :2]
    known = (free < init_blocks) | (free > own - local_blocks)
    blocks = torch.cat([forced, free.masked_fill(known, -1)], -1)
    blocks = blocks.masked_fill(blocks < 0, most).sort(-1).values  # as block selection writes it
    blocks = blocks.masked_fill(blocks == most, -1).to(torch.int32)

    sizes = (window, *rule.values(), 0.2, "")
    whole = forced_blocks.selected_and_window(x.q, x.k, x.v, blocks, x.cu_seqlens, *sizes)
    for piece in cut(batch):
        of_piece = (x.q[piece.rows], x.k, x.v, blocks[:, piece.rows].contiguous(), piece.cu_seqlens)
        for once in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(forced_blocks, "has_kernel", lambda *args, once=once: once)
                more = (*sizes, x.cu_seqlens, piece.q_start)
                found = forced_blocks.selected_and_window(*of_piece, *more)
            for a, b in zip(found, whole, strict=True):
                torch.testing.assert_close(a, b[piece.rows], rtol=1e-10, atol=1e-12)


def test_pieces_of_all_branches_meet_them_once(once: list[str]) -> None:
    """Inference adds the branches in the kernel; training keeps each one's output."""
    args = inputs()
    starts = torch.zeros(args[6].shape[0] - 1, dtype=torch.int32)
    expected = attend(args)
    torch.testing.assert_close(attend(args, q_start=starts, cu_seqlens_k=args[6]), expected)
    found = branches_forward(*args, *STATICS.values(), 9, 0.2, "", args[6], starts)
    torch.testing.assert_close(found[0], expected)
    summed = ["window_and_forced_blocks", "free_blocks_gated_sum"]
    assert once == [*summed, *summed, "window_and_forced_blocks", "free_blocks_attention"]


def test_calls_that_go_the_usual_way(once: list[str]) -> None:
    """Branches with keys of their own, and a branch that is off."""
    args = inputs()
    q, k, v = args[:3]
    attend(args, sliding=(k.clone(), v.clone()))
    attend(args, branches=("compressed", "selected"))
    attend(args, local_blocks=0)
    attend((q.requires_grad_(), *args[1:])).sum().backward()
    assert q.grad is not None
    assert once == []


@pytest.mark.parametrize(("init_blocks", "local_blocks"), [(0, 1), (1, 2), (3, 3)])
def test_parts_make_up_selected_attention(init_blocks: int, local_blocks: int) -> None:
    x = Packed(torch.float64)
    blocks = {"block_size": 4, "init_blocks": init_blocks, "local_blocks": local_blocks}
    own = reference.positions_in_sequence(x.cu_seqlens, x.q.shape[0])[:, None] // 4
    free = torch.randint(0, 9, (x.kv_heads, x.q.shape[0], 5))
    known = reference.forced_blocks(own[:, 0] * 4, **blocks).expand(x.kv_heads, -1, -1)
    topk_idx = torch.cat([known, torch.where(free <= own, free, -1)], -1).to(torch.int32)
    tensors, scale = (x.q, x.k, x.v), {"softmax_scale": 0.2}
    part = reference.forced_blocks_attention(*tensors, x.cu_seqlens, **blocks, **scale)
    found = reference.free_blocks_attention(
        *tensors, topk_idx, x.cu_seqlens, *part, **blocks, **scale
    )
    expected = reference.selected_attention(*tensors, topk_idx, x.cu_seqlens, block_size=4, **scale)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_calls_are_refused() -> None:
    q, k, v, _, _, gate, cu_seqlens, _ = inputs()
    with pytest.raises(InvalidInputError, match="local_blocks must be at least 1"):
        forced_blocks.window_and_forced_blocks(q, k, v, cu_seqlens, 9, 4, 1, 0, 0.2)
    o, lse = reference.forced_blocks_attention(q, k, v, cu_seqlens, **BLOCKS)
    topk_idx = torch.zeros((k.shape[1], q.shape[0], 3), dtype=torch.int32)
    call = (*BLOCKS.values(), 0.2)
    with pytest.raises(InvalidInputError, match=r"o_forced must have shape .* N is q's"):
        forced_blocks.free_blocks_attention(q, k, v, topk_idx, cu_seqlens, o[1:], lse, *call)
    with pytest.raises(InvalidInputError, match=r"o_sliding must have shape .* HQ is q's"):
        forced_blocks.free_blocks_gated_sum(
            q, k, v, topk_idx, cu_seqlens, o, lse, o, o[:, 1:], gate, *call
        )
