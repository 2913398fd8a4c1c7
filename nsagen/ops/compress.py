"""Compression of keys and values, before rope: window i covers tokens [i*s, i*s + l).

With x' = x + pe: `avgpool` is the mean of x', `weightedpool` sum_j w[h, j] x'_j, and `linear`
flatten(x') @ w[h].
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._checks import (
    check_compress_weights,
    check_cu_seqlens,
    check_indices,
    check_offsets,
    check_rows,
)
from nsagen.ops._gradients import reference_gradients
from nsagen.ops._launch import key_of, launch, on_kernels, with_contiguous_rows
from nsagen.ops.layout import compressed_cu_seqlens
from nsagen.ops.reference._checks import check_windows
from nsagen.runtime import Dispatcher

_OP = "compress"


def avgpool_compress(
    x: Tensor,
    w: Tensor | None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
    *,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of each window of tokens.

    Args:
        x: [N, HK, D], before rope.
        w: None.
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
    return _exact("avgpool", x, w, cu_seqlens, kernel_size, kernel_stride, pe, dispatcher)


def weightedpool_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
    *,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of each window, w [HK, kernel_size] used as it is; see `avgpool_compress`."""
    return _exact("weightedpool", x, w, cu_seqlens, kernel_size, kernel_stride, pe, dispatcher)


def linear_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
    *,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Each window, flattened, times w [HK, kernel_size * D, D]; see `avgpool_compress`."""
    return _exact("linear", x, w, cu_seqlens, kernel_size, kernel_stride, pe, dispatcher)


def compress(
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    *,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Compress without waiting for the device: the output's size depends on shapes alone.

    Takes what `avgpool_compress` takes, and a compress_type: "avgpool", "weightedpool", "linear".

    Returns:
        y [N // kernel_stride, HK, D], zeros past the last window, differentiable in x, w and
        pe; and y_cu_seqlens int32 [batch + 1].
    """
    check_windows(_OP, kernel_size, kernel_stride)
    check_offsets(_OP, "cu_seqlens", cu_seqlens)
    y_cu_seqlens = compressed_cu_seqlens(cu_seqlens, kernel_size, kernel_stride)
    statics = (compress_type, kernel_size, kernel_stride, key_of(dispatcher))
    return compress_forward(x, w, pe, cu_seqlens, y_cu_seqlens, *statics), y_cu_seqlens


def _exact(
    compress_type: str,
    x: Tensor,
    w: Tensor | None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None,
    dispatcher: Dispatcher | None,
) -> tuple[Tensor, Tensor]:
    y, y_cu_seqlens = compress(
        x,
        w,
        pe,
        cu_seqlens,
        compress_type=compress_type,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        dispatcher=dispatcher,
    )
    rows = y_cu_seqlens[-1].item()
    torch._check(rows >= 0)
    torch._check(rows <= y.shape[0])
    return y[:rows], y_cu_seqlens


@torch.library.custom_op("nsagen::compress_forward", mutates_args=())
def compress_forward(
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    y_cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: str = "",
) -> Tensor:
    """y [N // kernel_stride, HK, D], zeros past y_cu_seqlens[-1]."""
    check_rows(_OP, x=x)
    check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, x)
    check_indices(_OP, x, tuple(cu_seqlens.shape), y_cu_seqlens=y_cu_seqlens)
    check_windows(_OP, kernel_size, kernel_stride)
    check_compress_weights(_OP, x, w, pe, compress_type, kernel_size)
    statics = {
        "compress_type": compress_type,
        "kernel_size": kernel_size,
        "kernel_stride": kernel_stride,
    }
    if not on_kernels(x):
        return reference.compress(x, w, pe, cu_seqlens, **statics)[0]
    y = _allocate(x, kernel_stride)
    values = (compress_type, x.shape[2], kernel_size, kernel_stride, pe is not None)
    launch(dispatcher, _OP, "forward", values, (x, w, pe, cu_seqlens, y_cu_seqlens, y))
    return y


@compress_forward.register_fake
def _fake(
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    y_cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: str = "",
) -> Tensor:
    return _allocate(x, kernel_stride)


@torch.library.custom_op("nsagen::compress_backward", mutates_args=())
def compress_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    y_cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, dpe), empty for a w or pe that is None; without kernels through the reference."""
    if on_kernels(x):
        gradients = _allocate_gradients(x, w, pe)
        if dy.shape[0] == 0:  # fewer tokens than a stride: no window
            for gradient in gradients:
                gradient.zero_()
            return gradients
        dx, d_w, d_pe = gradients
        args = (with_contiguous_rows(dy), x, w, pe, cu_seqlens, y_cu_seqlens, dx)
        weights = (None if w is None else d_w, None if pe is None else d_pe)
        values = (compress_type, x.shape[2], kernel_size, kernel_stride, pe is not None)
        launch(dispatcher, _OP, "backward", values, (*args, *weights))
        return gradients
    given = [tensor for tensor in (w, pe) if tensor is not None]

    def forward(x: Tensor, *given: Tensor) -> Tensor:
        return reference.compress(
            x,
            None if w is None else given[0],
            None if pe is None else given[-1],
            cu_seqlens,
            compress_type=compress_type,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
        )[0]

    dx, *rest = reference_gradients(forward, (x, *given), dy)
    d_w = x.new_empty(0) if w is None else rest.pop(0)
    return dx, d_w, x.new_empty(0) if pe is None else rest.pop(0)


@compress_backward.register_fake
def _fake_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    y_cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(x, w, pe)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])
    ctx.statics = inputs[5:]


def _backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: activation checkpointing computes them anew at each access
    _, w, pe, *_ = saved
    dx, d_w, d_pe = compress_backward(dy, *saved, *ctx.statics)
    weights = (None if w is None else d_w, None if pe is None else d_pe)
    return (dx, *weights, None, None, None, None, None, None)


compress_forward.register_autograd(_backward, setup_context=_setup_context)


def _allocate(x: Tensor, kernel_stride: int) -> Tensor:
    return x.new_empty((x.shape[0] // kernel_stride, *x.shape[1:]))


def _allocate_gradients(
    x: Tensor, w: Tensor | None, pe: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_w, d_pe = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (w, pe))
    return x.new_empty(x.shape), d_w, d_pe
