"""fla-core's Native Sparse Attention with the signatures that `nsagen verify` calls.

    PYTHONPATH=examples/implementations nsagen verify \
        --implementation fla_core:topk_sparse_attention

fla-core takes one packed batch of shape [1, N, heads, head_dim]. Its compression windows are the
blocks themselves, and it always takes the first block and the last two.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import torch
from fla.ops.nsa.compression import parallel_nsa_compression
from fla.ops.nsa.naive import naive_nsa_selection
from fla.ops.nsa.parallel import parallel_nsa, parallel_nsa_topk
from torch import Tensor


def topk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float,
) -> Tensor:
    """The selected branch alone: no gates, no window."""
    return parallel_nsa(
        *(q[None], k[None], v[None]),
        block_indices=topk_idx.transpose(0, 1)[None],  # [1, N, HK, topk]
        block_counts=topk_idx.shape[-1],
        block_size=block_size,
        scale=softmax_scale,
        cu_seqlens=cu_seqlens,
    )[0]


def naive_selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float,
) -> Tensor:
    """The package's own reference, which needs no GPU."""
    blocks = topk_idx.transpose(0, 1)[None].long()
    given = (q[None], k[None], v[None], blocks)
    return naive_nsa_selection(*given, block_size, softmax_scale, cu_seqlens)[0]


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sm_scale: float,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    """Compressed attention, and the blocks that its probabilities select."""
    if not kernel_size == kernel_stride == block_size:
        raise ValueError("fla-core's windows are blocks: kernel_size = kernel_stride = block_size")
    if (init_blocks, local_blocks) != (1, 2):
        raise ValueError("fla-core takes the first block and the last two")
    keys, values = (_with_last_blocks(x, block_size, cu_seqlens_q, cu_seqlens_k) for x in (k, v))
    given = {"TK": len(q), "block_size": block_size, "scale": sm_scale, "cu_seqlens": cu_seqlens_q}
    o, lse = parallel_nsa_compression(q[None], keys[None], values[None], **given)
    blocks = parallel_nsa_topk(q[None], keys[None], lse=lse, block_counts=topk, **given)
    topk_idx = blocks[0, ..., :topk].transpose(0, 1)  # the best first
    past = 1 << 30
    topk_idx = topk_idx.masked_fill(topk_idx < 0, past).sort(-1).values
    return o[0], topk_idx.masked_fill(topk_idx == past, -1)


def _with_last_blocks(
    x: Tensor, block_size: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """Windows [sum(L // B), HK, D] with room for each sequence's last block, which may be short."""
    blocks = (cu_seqlens_q.diff() + block_size - 1) // block_size
    row = torch.arange(len(x), dtype=cu_seqlens_k.dtype, device=x.device)
    sequence = (row[:, None] >= cu_seqlens_k[1:]).sum(-1)
    place = row + (blocks.cumsum(0) - blocks - cu_seqlens_k[:-1])[sequence]
    room = x.new_zeros(len(x) + len(blocks), *x.shape[1:])
    return room.index_put((place,), x)
