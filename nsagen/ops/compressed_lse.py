"""The log-sum-exp of compressed attention's scores, where its output is not needed."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import check_tensors, check_windowed
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, lse_dtype, scale_of
from nsagen.runtime import Dispatcher


def compressed_lse(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float | None = None,
    q_start: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """log sum_i exp(softmax_scale q . k_i) over the windows i with i * s + l - 1 <= t.

    It normalizes the scores of `block_selection`: exactly with the same compressed keys,
    approximately with the means of longer windows with a larger stride.

    Args:
        q: [N, HQ, D], after rope.
        k: [>= sum M, HK, D], compressed keys; rows past the last window are ignored.
        cu_seqlens_q: int32 [batch + 1]; cu_seqlens_k: the same of the windows.
        kernel_size: tokens of a window of k; kernel_stride: tokens between two windows' starts.
        softmax_scale: of the scores; 1/sqrt(D) by default.
        q_start: int32 [batch], position of each sequence's first query; 0 by default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        [N, HQ], natural logarithm, float32 (float64 for float64 inputs); -inf where a query sees
        no window. Not differentiable.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scale, key = scale_of(softmax_scale, q), key_of(dispatcher)
    if torch.is_grad_enabled():
        q, k = q.detach(), k.detach()
    windows = (cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride)
    return compressed_lse_forward(q, k, *windows, scale, key, q_start)


compressed_lse_forward = op_of(
    "compressed_lse_forward",
    reference.compressed_lse,
    returns="lse",
    allocate=lambda q: q.new_empty(q.shape[:2], dtype=lse_dtype(q)),
    check=(check_tensors, check_windowed),
    kernel="compressed_lse forward",
    launch="q k cu_seqlens_q cu_seqlens_k lse softmax_scale q_start?",
)
