"""Branches of native-sparse-attention-pytorch with the signatures that `nsagen verify` calls.

    PYTHONPATH=examples/implementations nsagen verify --size gqa_ratio=4 --size head_dim=64 \
        --implementation nsa_pytorch:topk_sparse_attention

The package takes batches of equal lengths, so each sequence is a call of its own. Its compressed
branch has memory keys and selects blocks by a rule of its own: no op here has that contract.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from local_attention import LocalAttention
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
    """The fine branch: a token's own block, always, and whole earlier blocks."""
    from native_sparse_attention_pytorch.triton_native_sparse_attention import native_sparse_attend

    q = q * (softmax_scale * q.shape[-1] ** 0.5)  # the kernel has its own scale
    found = [q[:0]]
    for part in _sequences(cu_seqlens):
        blocks = topk_idx[:, part].long()
        own = torch.arange(blocks.shape[1], device=q.device)[:, None] // block_size
        if not (blocks == own).any(-1).all():
            raise ValueError("the package always takes a token's own block")
        earlier = (blocks >= 0) & (blocks < own)
        batch = (x[part].transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, n, head_dim]
        chosen = (torch.where(earlier, blocks, 0)[None], earlier[None])
        found.append(native_sparse_attend(*batch, block_size, *chosen)[0].transpose(0, 1))
    return torch.cat(found)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float,
) -> Tensor:
    """The window of its module: LocalAttention, which sees `window_size` keys before its own."""
    window = LocalAttention(
        window_size - 1,
        causal=True,
        autopad=True,
        exact_windowsize=True,
        scale=softmax_scale,
        use_rotary_pos_emb=False,
    )
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    found = [q[:0]]
    for part in _sequences(cu_seqlens):
        found.append(window(*(x[part].transpose(0, 1) for x in (q, k, v))).transpose(0, 1))
    return torch.cat(found)


def _sequences(cu_seqlens: Tensor) -> Iterator[slice]:
    """The tokens of each sequence that has any."""
    ends = cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        if start < end:
            yield slice(start, end)
