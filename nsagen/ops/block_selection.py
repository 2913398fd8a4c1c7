"""Block selection: the blocks of tokens that each query's compressed attention finds important.

score[t, j] = sum over the group's heads and windows i of p[h, t, i] * overlap(i, j) / s.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import (
    check_cu_seqlens,
    check_keys,
    check_like,
    check_q_start,
    check_rows,
    fail,
)
from nsagen.ops._launch import lse_dtype
from nsagen.ops._op import define_op
from nsagen.ops.reference.block_selection import BlockRule

_OP = "block_selection"


def _check(call: Any) -> None:
    check_rows(_OP, q=call.q, k=call.k)
    check_keys(_OP, call.q, call.k)
    check_cu_seqlens(_OP, "cu_seqlens_q", call.cu_seqlens_q, call.q)
    check_cu_seqlens(_OP, "cu_seqlens_k", call.cu_seqlens_k, call.k, spare=True)
    check_like(_OP, ("cu_seqlens_q", call.cu_seqlens_q), cu_seqlens_k=call.cu_seqlens_k)
    BlockRule(**{name: getattr(call, name) for name in BlockRule.__annotations__})
    (lse, shape), dtype = (call.lse, call.q.shape[:2]), lse_dtype(call.q)
    if lse.shape != shape or lse.dtype != dtype or not lse.is_contiguous():
        needs = f"lse must be contiguous {dtype} {tuple(shape)}"
        fail(_OP, needs, f"{lse.dtype} {tuple(lse.shape)}", "pass compressed attention's own")
    check_q_start(_OP, call.cu_seqlens_q, call.q_start)


@define_op(
    returns="topk_idx",
    allocate=lambda q, k, topk: q.new_empty((k.shape[1], q.shape[0], topk), dtype=torch.int32),
    check=_check,
    kernel="block_selection forward",
    sizes=lambda q, k: {"head_dim": q.shape[2], "gqa_ratio": q.shape[1] // k.shape[1]},
    launch="q k lse cu_seqlens_q cu_seqlens_k topk_idx softmax_scale",
    optional="q_start",
)
def block_selection_forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float,
    dispatcher: str = "",
    q_start: Tensor | None = None,
) -> Tensor:
    """topk_idx int32 [HK, N, topk]: ascending block indices within the sequence, then -1.

    Args:
        q: [N, HQ, D]; k: [>= sum M, HK, D], compressed keys.
        lse: [N, HQ], natural, from compressed attention.
        q_start: int32 [batch], position of each sequence's first query, for a chunk of a longer
            prompt whose earlier windows are in k; None: 0.
    """
    rule = BlockRule(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    more = {"softmax_scale": softmax_scale, "q_start": q_start}
    return reference.block_selection(q, k, lse, cu_seqlens_q, cu_seqlens_k, **asdict(rule), **more)


def select_blocks(q: Tensor, k: Tensor, lse: Tensor, *args: Any) -> Tensor:
    """`block_selection_forward` on tensors with gradients, of which it has none."""
    if torch.is_grad_enabled():
        q, k, lse = q.detach(), k.detach(), lse.detach()
    return block_selection_forward(q, k, lse, *args)
