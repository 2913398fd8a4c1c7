"""Arithmetic on the packed layout: offsets and positions, without waiting for the device.

Packed tensors hold the tokens of all sequences one after the other; `cu_seqlens`, int32
[batch + 1], says where each begins. Nothing here reads a value on the host, so a call
neither synchronises a GPU nor breaks a graph under capture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def positions_in_sequence(cu_seqlens: Tensor, total: int, q_start: Tensor | None = None) -> Tensor:
    """Position of each packed token in its own sequence.

    Args:
        cu_seqlens: int32 [batch + 1].
        total: tokens of the packed tensor; more than `cu_seqlens[-1]` are allowed.
        q_start: int32 [batch], the position of each sequence's first packed token; None: 0.

    Returns:
        int32 [total]; 0 for the rows past `cu_seqlens[-1]`.
    """
    tokens = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    # right=True steps over empty sequences: the last sequence that begins at or before the token.
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    positions = tokens - cu_seqlens[sequence]
    if q_start is not None:
        positions = positions + functional.pad(q_start, (0, 1))[sequence]
    return positions.masked_fill(tokens >= cu_seqlens[-1], 0).to(torch.int32)


def compressed_cu_seqlens(cu_seqlens: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Offsets of the compressed sequences: M = max(0, (L - kernel_size) // kernel_stride + 1).

    The division floors, so that a sequence shorter than `kernel_size` has no window.

    Args:
        cu_seqlens: int32 [batch + 1].
        kernel_size: tokens of a window.
        kernel_stride: tokens between the starts of two windows.

    Returns:
        int32 [batch + 1].
    """
    spare = cu_seqlens.diff() - kernel_size
    windows = (torch.div(spare, kernel_stride, rounding_mode="floor") + 1).clamp(min=0)
    return functional.pad(windows.cumsum(0, dtype=torch.int32), (1, 0))
