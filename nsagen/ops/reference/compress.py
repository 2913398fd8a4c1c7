"""Compression of keys and values: each window of tokens becomes one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.core.errors import InvalidInputError
from nsagen.ops.layout import compressed_cu_seqlens
from nsagen.ops.reference._attend import contract, wide_dtype
from nsagen.ops.reference._checks import check_windows, sequence_bounds

Weight = Tensor | tuple[Tensor, Tensor] | None
"""What compresses windows: None for avgpool, (w1, w2) for mlp, else one tensor."""


def pool_windows(windows: Tensor, w: Weight, pe: Tensor | None, compress_type: str) -> Tensor:
    """Reduce windows of tokens to one token each.

    With x'[m, j] = windows[m, j] + pe[:, j]:
    `avgpool`: mean over j of x'[m, j];
    `weightedpool`: sum_j w[h, j] x'[m, j, h];
    `sigmoid_mul`: 2/l sum_j sigmoid(w[h, j] . x'[m, j, h]) x'[m, j, h];
    `linear`: flatten(x'[m, :, h]) @ w[h];
    `mlp`: silu(flatten(x'[m, :, h]) @ w1[h]) @ w2[h].

    Args:
        windows: [M, kernel_size, HK, D].
        w: None for avgpool; [HK, kernel_size] for weightedpool; [HK, kernel_size, D] for
            sigmoid_mul; [HK, kernel_size * D, D] for linear, rows ordered token by token; for mlp
            (w1, w2), [HK, kernel_size * D, H] in the same order and [HK, H, D].
        pe: [HK, kernel_size, D] or None.
        compress_type: one of `nsagen.core.workload.COMPRESS_TYPES`.

    Returns:
        [M, HK, D] in the dtype of `windows`.
    """
    check_weights("compress", windows.shape[1:], w, pe, compress_type)
    dtype = wide_dtype(windows, *tensors_of(w), pe)
    wide = _embedded(windows.to(dtype), pe)
    weights = [tensor.to(dtype) for tensor in tensors_of(w)]
    if compress_type == "avgpool":
        y = wide.mean(1)
    elif compress_type == "weightedpool":
        y = contract("mjhd,hj->mhd", wide, *weights)
    elif compress_type == "sigmoid_mul":
        gates = contract("mjhd,hjd->mjh", wide, *weights).sigmoid()
        y = contract("mjhd,mjh->mhd", wide, gates) * (2 / wide.shape[1])
    else:
        y = flat_product(wide, weights[0])
    if compress_type == "mlp":
        y = contract("mhk,hke->mhe", functional.silu(y), weights[1])
    return y.to(windows.dtype).contiguous()


def _embedded(windows: Tensor, pe: Tensor | None) -> Tensor:
    """Windows [M, l, HK, D] and, if any, the position embedding of their tokens."""
    return windows if pe is None else windows + pe.to(windows.dtype).transpose(0, 1)


def flat_product(windows: Tensor, w: Tensor) -> Tensor:
    """Windows [M, l, HK, D], each flattened token by token, times w [HK, l * D, E]: [M, HK, E]."""
    size, _, dim = windows.shape[1:]
    return contract("mjhd,hjde->mhe", windows, w.unflatten(1, (size, dim)))


def weight_of(first: Tensor | None, second: Tensor | None) -> Weight:
    """A weight from its tensors; an mlp has two."""
    return first if first is None or second is None else (first, second)


def layers_of(w: Weight) -> tuple[Tensor | None, Tensor | None]:
    """A weight's two tensors, each of which may be None: the inverse of `weight_of`."""
    first, second, *_ = (*tensors_of(w), None, None)
    return first, second


def tensors_of(w: Weight) -> tuple[Tensor, ...]:
    """The tensors of a compress_type's weight: none, one, or an mlp's two."""
    if w is None:
        return ()
    return w if isinstance(w, tuple) else (w,)


def check_weights(
    where: str, window: torch.Size, w: Weight, pe: Tensor | None, compress_type: str
) -> None:
    """Check w and pe against a window [kernel_size, HK, D].

    Raises:
        InvalidInputError: an unknown compress_type, or a weight of another shape.
    """
    size, heads, dim = window
    hidden = w[0].shape[-1] if isinstance(w, tuple) and w and w[0].ndim else "H"
    shapes: dict[str, tuple[tuple[object, ...], ...]] = {
        "avgpool": (),
        "weightedpool": ((heads, size),),
        "linear": ((heads, size * dim, dim),),
        "sigmoid_mul": ((heads, size, dim),),
        "mlp": ((heads, size * dim, hidden), (heads, hidden, dim)),
    }
    if compress_type not in shapes:
        raise InvalidInputError(
            f"{where}: compress_type must be one of {', '.join(shapes)}; got {compress_type!r}; "
            f"correct the name"
        )
    came, needed = tuple(tuple(tensor.shape) for tensor in tensors_of(w)), shapes[compress_type]
    if came != needed or isinstance(w, tuple) != (compress_type == "mlp") or hidden == 0:
        raise InvalidInputError(
            f"{where}: the weight for {compress_type} must be {_shown(needed)}; "
            f"got {_shown(came)}; pass None for avgpool, [HK, l] for weightedpool, "
            f"[HK, l*D, D] for linear, [HK, l, D] for sigmoid_mul, and for mlp the tuple "
            f"([HK, l*D, H], [HK, H, D])"
        )
    if pe is not None and tuple(pe.shape) != (heads, size, dim):
        raise InvalidInputError(
            f"{where}: pe must be {(heads, size, dim)}; got {tuple(pe.shape)}; "
            f"pass [HK, kernel_size, D], or None"
        )


def _shown(shapes: tuple[tuple[object, ...], ...]) -> str:
    """No shape as None, one as itself, more as their tuple."""
    each = [f"({', '.join(str(n) for n in shape)})" for shape in shapes]
    return f"({', '.join(each)})" if len(each) > 1 else "".join(each) or "None"


def compress(
    x: Tensor,
    w: Weight,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    *,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    lengths: object = None,
) -> tuple[Tensor, Tensor]:
    """Compress packed tokens into an output whose size depends on shapes alone.

    Args:
        x: [N, HK, D], before rope.
        w: see `pool_windows`.
        pe: [HK, kernel_size, D], added to each window's tokens, or None.
        cu_seqlens: int32 [batch + 1].
        compress_type: one of `nsagen.core.workload.COMPRESS_TYPES`.
        kernel_size: tokens of a window.
        kernel_stride: tokens between the starts of two windows.
        lengths: not needed; accepted for callers that pass them.

    Returns:
        y [N // kernel_stride, HK, D] in x's dtype, zeros past the last window, and
        y_cu_seqlens int32 [batch + 1].
    """
    y, y_cu_seqlens = compress_exactly(
        x, w, pe, cu_seqlens, compress_type, kernel_size, kernel_stride
    )
    return _with_spare_rows(y, x, kernel_stride), y_cu_seqlens


def mlp_first_layer(
    x: Tensor,
    w1: Tensor,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
) -> Tensor:
    """What an mlp applies silu to: each window of x + pe, flattened, times w1 [HK, l * D, H].

    Returns:
        [N // kernel_stride, HK, H] in x's dtype, zeros past the last window.
    """
    windows = _windows_of("mlp", x, cu_seqlens, kernel_size, kernel_stride)
    dtype = wide_dtype(x, w1, pe)
    wide = _embedded(windows.to(dtype), pe)
    return _with_spare_rows(flat_product(wide, w1.to(dtype)).to(x.dtype), x, kernel_stride)


def _with_spare_rows(y: Tensor, x: Tensor, kernel_stride: int) -> Tensor:
    """y and zeros after it, so that its size depends on x's alone."""
    spare = x.shape[0] // kernel_stride - y.shape[0]
    return torch.cat((y, y.new_zeros(spare, *y.shape[1:])))


def _windows_of(
    compress_type: str, x: Tensor, cu_seqlens: Tensor, kernel_size: int, kernel_stride: int
) -> Tensor:
    """All windows of a packed batch, [M, kernel_size, HK, D]."""
    where = f"{compress_type} compress"
    check_windows(where, kernel_size, kernel_stride)
    if x.ndim != 3:
        raise InvalidInputError(
            f"{where}: x must be [N, HK, D]; got {tuple(x.shape)}; "
            f"pass a packed tensor, tokens first"
        )
    starts = []
    for start, end in sequence_bounds(where, cu_seqlens, x.shape[0]):
        last = end - kernel_size + 1
        starts.append(torch.arange(start, max(start, last), kernel_stride, device=x.device))
    return x[torch.cat(starts).unsqueeze(1) + torch.arange(kernel_size, device=x.device)]


def compress_exactly(
    x: Tensor,
    w: Weight,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
) -> tuple[Tensor, Tensor]:
    """`compress` with exactly as many rows as there are windows."""
    windows = _windows_of(compress_type, x, cu_seqlens, kernel_size, kernel_stride)
    y = pool_windows(windows, w, pe, compress_type)
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
    return compress_exactly(x, w, pe, cu_seqlens, "avgpool", kernel_size, kernel_stride)


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
    return compress_exactly(x, w, pe, cu_seqlens, "weightedpool", kernel_size, kernel_stride)


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
    return compress_exactly(x, w, pe, cu_seqlens, "linear", kernel_size, kernel_stride)


def sigmoid_mul_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """2/l times the sum of each window's tokens, each times its gate sigmoid(w[h, j] . x'_j).

    w is [HK, kernel_size, D]. The gates depend on the tokens themselves; w = 0 gives the mean.
    x [N, HK, D] -> (y [sum M, HK, D], y_cu_seqlens).
    """
    return compress_exactly(x, w, pe, cu_seqlens, "sigmoid_mul", kernel_size, kernel_stride)


def mlp_compress(
    x: Tensor,
    w: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two layers on each window, flattened token by token: silu(x' @ w1) @ w2.

    w is (w1 [HK, kernel_size * D, H], w2 [HK, H, D]) with a hidden size H of any value.
    x [N, HK, D] -> (y [sum M, HK, D], y_cu_seqlens).
    """
    return compress_exactly(x, w, pe, cu_seqlens, "mlp", kernel_size, kernel_stride)
