"""Compute forced blocks once: selected attention starts from the window kernel's result.

A token always selects its first and its local blocks, and its window reaches most of the local
ones. So one pass over the window's keys gives two results, and selected attention is left with the
blocks that scores chose. This takes branches that share keys and values, and kernels for both
steps, which Hopper has for heads of 64 and 128 in 16 bits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsagen.core.workload import FORCED_ONCE
from nsagen.ops import reference
from nsagen.ops._checks import (
    check_packed,
    check_tensors,
    check_topk_idx,
    check_window,
    fail,
)
from nsagen.ops._derive import called, dense, op_like, op_of
from nsagen.ops._launch import attention_outputs, attention_sizes, has_kernel
from nsagen.ops._op import define_op
from nsagen.ops.gated_sum import gated_sum_forward
from nsagen.ops.selected_attention import selected_attention_forward
from nsagen.ops.sliding_window_attention import sliding_window_attention_forward


def applies(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    dispatcher: str,
) -> bool:
    """Whether a call whose branches all read k and v computes its forced blocks once: each token
    has a local block, and the dispatcher has kernels for both steps."""
    if local_blocks < 1:
        return False
    blocks = {"block_size": block_size, "init_blocks": init_blocks, "local_blocks": local_blocks}
    window = {"window_size": window_size}
    sizes = {op: attention_sizes(q, k, v) | blocks for op, _ in FORCED_ONCE}
    sizes["sliding_window_attention"] |= window
    return all(has_kernel(dispatcher, op, pass_, sizes[op], q) for op, pass_ in FORCED_ONCE)


def _check_blocks(op: str, block_size: int, init_blocks: int, local_blocks: int) -> None:
    if block_size < 1 or init_blocks < 0 or local_blocks < 1:
        came = f"{block_size}, {init_blocks}, {local_blocks}"
        rule = "block_size and local_blocks must be at least 1, and init_blocks at least 0"
        fail(op, rule, came, "without local blocks, use selected_attention")


_CHECKS = (check_tensors, check_packed, check_topk_idx, _check_blocks)


def _window_and_forced_blocks(call: Any) -> tuple[Tensor, ...]:
    sliding = called(reference.sliding_window_attention_forward, call)
    return *sliding, *called(reference.forced_blocks_attention, call)


free_blocks_attention = op_of(
    "free_blocks_attention",
    reference.free_blocks_attention,
    returns="o lse",
    allocate=attention_outputs,
    check=_CHECKS,
    kernel="selected_attention forward",
    launch="q k v topk_idx cu_seqlens o lse softmax_scale cu_seqlens_k q_start o_forced lse_forced",
)
"""(o [N, HQ, Dv], lse [N, HQ]) of selected attention, from the forced blocks' part of it as
`window_and_forced_blocks` gives it; no gradient. topk_idx is as block selection writes it:
ascending, each block once, the forced ones among them, then -1."""


window_and_forced_blocks = op_like(
    "window_and_forced_blocks",
    (sliding_window_attention_forward, free_blocks_attention),
    _window_and_forced_blocks,
    "q k v cu_seqlens window_size block_size init_blocks local_blocks softmax_scale dispatcher"
    " cu_seqlens_k q_start",
    returns="o lse o_forced lse_forced",
    allocate=lambda q, v: (*attention_outputs(q, v), *attention_outputs(q, v)),
    check=(check_tensors, check_packed, check_window, _check_blocks),
    kernel="sliding_window_attention forward",
    launch="q k v cu_seqlens o lse softmax_scale cu_seqlens_k q_start o_forced lse_forced",
)
"""(o, lse) of the sliding window, and (o, lse) of the forced blocks alone: init_blocks at the start
of a sequence and local_blocks up to a token's own; no gradient."""


def _free_blocks_gated_sum(call: Any) -> Tensor:
    o, _ = called(reference.free_blocks_attention, call)
    return reference.gated_sum(call.o_compressed, o, call.o_sliding, call.gate)


free_blocks_gated_sum = op_like(
    "free_blocks_gated_sum",
    (free_blocks_attention, gated_sum_forward),
    _free_blocks_gated_sum,
    "q k v topk_idx cu_seqlens o_forced lse_forced o_compressed o_sliding gate block_size"
    " init_blocks local_blocks softmax_scale dispatcher cu_seqlens_k q_start",
    returns="o",
    allocate=lambda q, v: attention_outputs(q, v)[0],
    scratch={"lse": lambda q, v: attention_outputs(q, v)[1]},
    check=_CHECKS,
    kernel="selected_attention forward",
    launch="q k v topk_idx cu_seqlens o lse softmax_scale cu_seqlens_k q_start o_forced lse_forced "
    "o_compressed o_sliding gate",
    prepare=dense("o_compressed o_sliding gate"),
)
"""o [N, HQ, Dv]: the gated sum of `free_blocks_attention` and the other branches; no gradient."""


@define_op(
    returns="o_selected lse_selected o_sliding lse_sliding",
    allocate=lambda q, v: (*attention_outputs(q, v), *attention_outputs(q, v)),
)
def selected_and_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse) of selected attention and of the sliding window, which share k and v; their forced
    blocks are computed once where that `applies`. No gradient.

    Args:
        topk_idx: as block selection writes it.
        others: as in `window_and_forced_blocks`.
    """
    blocks = (block_size, init_blocks, local_blocks)
    more = (softmax_scale, dispatcher, cu_seqlens_k, q_start)
    if applies(q, k, v, window_size, *blocks, dispatcher):
        o_sliding, lse_sliding, *forced = window_and_forced_blocks(
            q, k, v, cu_seqlens, window_size, *blocks, *more
        )
        selected = free_blocks_attention(q, k, v, topk_idx, cu_seqlens, *forced, *blocks, *more)
        return *selected, o_sliding, lse_sliding
    selected = selected_attention_forward(q, k, v, topk_idx, cu_seqlens, block_size, *more)
    return *selected, *sliding_window_attention_forward(q, k, v, cu_seqlens, window_size, *more)
