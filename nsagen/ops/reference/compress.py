"""Compression of keys and values: each window of tokens becomes one."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.errors import InvalidInputError
from nsagen.ops.layout import compressed_cu_seqlens
from nsagen.ops.reference._attend import contract, wide_dtype
from nsagen.ops.reference._checks import check_windows, sequence_bounds


def pool_windows(
    windows: Tensor, w: Tensor | None, pe: Tensor | None, compress_type: str
) -> Tensor:
    """Reduce windows of tokens to one token each.

    x'[m, j] = windows[m, j] + pe[:, j]; then `avgpool`: mean over j; `weightedpool`:
    sum_j w[h, j] x'[m, j, h]; `linear`: flatten(x'[m, :, h]) @ w[h].

    Args:
        windows: [M, kernel_size, HK, D].
        w: None for avgpool; [HK, kernel_size] for weightedpool; [HK, kernel_size * D, D] for
            linear, rows ordered token by token.
        pe: [HK, kernel_size, D] or None.
        compress_type: "avgpool", "weightedpool" or "linear".

    Returns:
        [M, HK, D] in the dtype of `windows`.
    """
    check_weights("compress", windows.shape[1:], w, pe, compress_type)
    dtype = wide_dtype(windows, w, pe)
    wide = windows.to(dtype)
    if pe is not None:
        wide = wide + pe.to(dtype).transpose(0, 1)
    if w is None:
        y = wide.mean(1)
    elif compress_type == "weightedpool":
        y = contract("mjhd,hj->mhd", wide, w.to(dtype))
    else:
        size, _, dim = wide.shape[1:]
        y = contract("mjhd,hjde->mhe", wide, w.to(dtype).unflatten(1, (size, dim)))
    return y.to(windows.dtype).contiguous()


def check_weights(
    where: str, window: torch.Size, w: Tensor | None, pe: Tensor | None, compress_type: str
) -> None:
    """Check w and pe against a window [kernel_size, HK, D].

    Raises:
        InvalidInputError: an unknown compress_type, or a weight of another shape.
    """
    size, heads, dim = window
    shapes = {"avgpool": None, "weightedpool": (heads, size), "linear": (heads, size * dim, dim)}
    if compress_type not in shapes:
        raise InvalidInputError(
            f"{where}: compress_type must be one of {', '.join(shapes)}; got {compress_type!r}; "
            f"correct the name"
        )
    came = None if w is None else tuple(w.shape)
    if came != shapes[compress_type]:
        raise InvalidInputError(
            f"{where}: the weight for {compress_type} must be {shapes[compress_type]}; got {came}; "
            f"pass None for avgpool, [HK, l] for weightedpool, [HK, l*D, D] for linear"
        )
    if pe is not None and tuple(pe.shape) != (heads, size, dim):
        raise InvalidInputError(
            f"{where}: pe must be {(heads, size, dim)}; got {tuple(pe.shape)}; "
            f"pass [HK, kernel_size, D], or None"
        )


def compress(
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    *,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
) -> tuple[Tensor, Tensor]:
    """Compress packed tokens into an output whose size depends on shapes alone.

    Args:
        x: [N, HK, D], before rope.
        w: see `pool_windows`.
        pe: [HK, kernel_size, D], added to each window's tokens, or None.
        cu_seqlens: int32 [batch + 1].
        compress_type: "avgpool", "weightedpool" or "linear".
        kernel_size: tokens of a window.
        kernel_stride: tokens between the starts of two windows.

    Returns:
        y [N // kernel_stride, HK, D] in x's dtype, zeros past the last window, and
        y_cu_seqlens int32 [batch + 1].
    """
    y, y_cu_seqlens = _compress(x, w, pe, cu_seqlens, compress_type, kernel_size, kernel_stride)
    spare = x.shape[0] // kernel_stride - y.shape[0]
    return torch.cat((y, y.new_zeros(spare, *y.shape[1:]))), y_cu_seqlens


def _compress(
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
) -> tuple[Tensor, Tensor]:
    """`compress` with exactly as many rows as there are windows."""
    check_windows(f"{compress_type} compress", kernel_size, kernel_stride)
    if x.ndim != 3:
        raise InvalidInputError(
            f"{compress_type} compress: x must be [N, HK, D]; got {tuple(x.shape)}; "
            f"pass a packed tensor, tokens first"
        )
    starts = []
    for start, end in sequence_bounds(f"{compress_type} compress", cu_seqlens, x.shape[0]):
        last = end - kernel_size + 1
        starts.append(torch.arange(start, max(start, last), kernel_stride, device=x.device))
    tokens = torch.cat(starts).unsqueeze(1) + torch.arange(kernel_size, device=x.device)
    y = pool_windows(x[tokens], w, pe, compress_type)
    return y, compressed_cu_seqlens(cu_seqlens, kernel_size, kernel_stride)


def avgpool_compress(
    x: Tensor,
    w: None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of each window: x [N, HK, D] -> (y [sum M, HK, D], y_cu_seqlens). `w` is None."""
    return _compress(x, w, pe, cu_seqlens, "avgpool", kernel_size, kernel_stride)


def weightedpool_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of each window, w [HK, kernel_size] used as it is, without a softmax.

    x [N, HK, D] -> (y [sum M, HK, D], y_cu_seqlens).
    """
    return _compress(x, w, pe, cu_seqlens, "weightedpool", kernel_size, kernel_stride)


def linear_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each window, flattened token by token, times w [HK, kernel_size * D, D].

    x [N, HK, D] -> (y [sum M, HK, D], y_cu_seqlens).
    """
    return _compress(x, w, pe, cu_seqlens, "linear", kernel_size, kernel_stride)
