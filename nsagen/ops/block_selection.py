"""Block selection: the blocks of tokens that each query's compressed attention finds important.

score[t, j] = sum over the group's heads and windows i of p[h, t, i] * overlap(i, j) / s.
"""

from __future__ import annotations

from dataclasses import asdict, astuple

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
from nsagen.ops._launch import launch, lse_dtype, on_kernels
from nsagen.ops.reference.block_selection import BlockRule

_OP = "block_selection"


@torch.library.custom_op("nsagen::block_selection_forward", mutates_args=())
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
    check_rows(_OP, q=q, k=k)
    check_keys(_OP, q, k)
    check_cu_seqlens(_OP, "cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens(_OP, "cu_seqlens_k", cu_seqlens_k, k, spare=True)
    check_like(_OP, ("cu_seqlens_q", cu_seqlens_q), cu_seqlens_k=cu_seqlens_k)
    rule = BlockRule(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    if lse.shape != q.shape[:2] or lse.dtype != lse_dtype(q) or not lse.is_contiguous():
        needs = f"lse must be contiguous {lse_dtype(q)} {tuple(q.shape[:2])}"
        fail(_OP, needs, f"{lse.dtype} {tuple(lse.shape)}", "pass compressed attention's own")
    check_q_start(_OP, cu_seqlens_q, q_start)
    if not on_kernels(q):
        return reference.block_selection(
            q,
            k,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            **asdict(rule),
            softmax_scale=softmax_scale,
            q_start=q_start,
        )
    topk_idx = _allocate(q, k, topk)
    values = (q.shape[2], q.shape[1] // k.shape[1], *astuple(rule))
    args = (q, k, lse, cu_seqlens_q, cu_seqlens_k, topk_idx, softmax_scale)
    launch(dispatcher, _OP, "forward", values, args if q_start is None else (*args, q_start))
    return topk_idx


@block_selection_forward.register_fake
def _fake(
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
    return _allocate(q, k, topk)


def _allocate(q: Tensor, k: Tensor, topk: int) -> Tensor:
    return q.new_empty((k.shape[1], q.shape[0], topk), dtype=torch.int32)
