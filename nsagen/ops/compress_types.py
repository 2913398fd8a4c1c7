"""Compression of keys and values by each of its types, with as many rows as there are windows."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops.compress import compress
from nsagen.ops.reference.compress import Weight
from nsagen.runtime import Dispatcher


def _of_type(compress_type: str, formula: str):  # its type is the inner function's
    def compress_exactly(
        x: Tensor,
        w: Weight,
        cu_seqlens: Tensor,
        kernel_size: int,
        kernel_stride: int,
        pe: Tensor | None = None,
        *,
        dispatcher: Dispatcher | None = None,
    ) -> tuple[Tensor, Tensor]:
        """

        Args:
            x: [N, HK, D], before rope.
            w: the weight; None for avgpool.
            cu_seqlens: int32 [batch + 1].
            kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.
            pe: [HK, kernel_size, D], added to each window's tokens, or None.
            dispatcher: the generated kernels to use; by default they are built when missing.

        Returns:
            y [sum M, HK, D] with M = max(0, (L - l) // s + 1) windows a sequence, and y_cu_seqlens
            int32 [batch + 1]. The number of rows is read from the device; `compress` avoids that.

        Raises:
            InvalidInputError: a tensor or parameter breaks the contract above.
        """
        y, y_cu_seqlens = compress(
            *(x, w, pe, cu_seqlens),
            compress_type=compress_type,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            dispatcher=dispatcher,
        )
        rows = y_cu_seqlens[-1].item()
        torch._check(rows >= 0)
        torch._check(rows <= y.shape[0])
        return y[:rows], y_cu_seqlens

    compress_exactly.__name__ = compress_exactly.__qualname__ = f"{compress_type}_compress"
    compress_exactly.__doc__ = formula + (compress_exactly.__doc__ or "")
    return compress_exactly


avgpool_compress = _of_type("avgpool", "Mean of each window of tokens.")

weightedpool_compress = _of_type(
    "weightedpool", "Weighted sum of each window, w [HK, kernel_size] used as it is."
)

linear_compress = _of_type("linear", "Each window, flattened, times w [HK, kernel_size * D, D].")

sigmoid_mul_compress = _of_type(
    "sigmoid_mul",
    """2/kernel_size times the sum of each window's tokens, each weighed by its own gate.

        With x' = x + pe, the gate of token j is sigmoid(w[h, j] . x'_j), w [HK, kernel_size, D]: it
        depends on the data, so a window can keep what matters of it, which serves values well. A w
        of 0 gives the mean.""",
)

mlp_compress = _of_type(
    "mlp",
    """Two layers on each window, flattened: silu(x' @ w1) @ w2.

        w is (w1 [HK, kernel_size * D, H], w2 [HK, H, D]) with any hidden size H.""",
)
