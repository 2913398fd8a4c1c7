"""Compression of keys and values, before rope: window i covers tokens [i*s, i*s + l).

With x' = x + pe: `avgpool` is the mean of x', `weightedpool` sum_j w[h, j] x'_j, `sigmoid_mul`
2/l sum_j sigmoid(w[h, j] . x'_j) x'_j, `linear` flatten(x') @ w[h], and `mlp`
silu(flatten(x') @ w1[h]) @ w2[h], whose custom op is the product with w1 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.core.workload import Param
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
from nsagen.ops.reference.compress import Weight
from nsagen.runtime import Dispatcher

_OP = "compress"


def compress(
    x: Tensor,
    w: Weight,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    *,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: Dispatcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Compress without waiting for the device: the output's size depends on shapes alone.

    Args:
        x: [N, HK, D], before rope.
        w: None for avgpool; [HK, kernel_size] for weightedpool; [HK, kernel_size * D, D] for
            linear; [HK, kernel_size, D] for sigmoid_mul; for mlp the tuple (w1, w2) of
            [HK, kernel_size * D, H] and [HK, H, D].
        pe: [HK, kernel_size, D], added to each window's tokens, or None.
        cu_seqlens: int32 [batch + 1].
        compress_type: one of `nsagen.core.workload.COMPRESS_TYPES`.
        kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        y [N // kernel_stride, HK, D], zeros past the last window, differentiable in x, w and
        pe; and y_cu_seqlens int32 [batch + 1].

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    check_windows(_OP, kernel_size, kernel_stride)
    check_offsets(_OP, "cu_seqlens", cu_seqlens)
    y_cu_seqlens = compressed_cu_seqlens(cu_seqlens, kernel_size, kernel_stride)
    statics = (compress_type, kernel_size, kernel_stride, key_of(dispatcher))
    if compress_type != "mlp" and not isinstance(w, tuple):
        return compress_forward(x, w, pe, cu_seqlens, y_cu_seqlens, *statics), y_cu_seqlens
    check_rows(_OP, x=x)
    check_compress_weights(_OP, x, w, pe, compress_type, kernel_size)
    assert isinstance(w, tuple)
    before = compress_forward(x, w[0], pe, cu_seqlens, y_cu_seqlens, *statics)
    return _second_layer(before, w[1]), y_cu_seqlens


def _second_layer(before: Tensor, w2: Tensor) -> Tensor:
    """silu(before) @ w2, [M, HK, H] and [HK, H, D] to [M, HK, D].

    By PyTorch, gradients too: it is 1/kernel_size of the first layer's work, and those need
    `before` as it is. Rows without a window are zeros before and after.
    """
    with torch.autocast(before.device.type, enabled=False):
        return torch.bmm(functional.silu(before).transpose(0, 1), w2).transpose(0, 1)


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
    """y [N // kernel_stride, HK, D], zeros past y_cu_seqlens[-1]; for mlp [.., H], w being w1."""
    check_rows(_OP, x=x)
    check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, x)
    check_indices(_OP, x, tuple(cu_seqlens.shape), y_cu_seqlens=y_cu_seqlens)
    check_windows(_OP, kernel_size, kernel_stride)
    if compress_type != "mlp":  # its two weights were checked together
        check_compress_weights(_OP, x, w, pe, compress_type, kernel_size)
    if not on_kernels(x):
        return _by_reference(x, w, pe, cu_seqlens, compress_type, kernel_size, kernel_stride)
    y = _allocate(x, w, compress_type, kernel_stride)
    values = _static_values(x, w, pe, compress_type, kernel_size, kernel_stride)
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
    return _allocate(x, w, compress_type, kernel_stride)


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
        values = _static_values(x, w, pe, compress_type, kernel_size, kernel_stride)
        launch(dispatcher, _OP, "backward", values, (*args, *weights))
        return gradients
    given = [tensor for tensor in (w, pe) if tensor is not None]

    def forward(x: Tensor, *given: Tensor) -> Tensor:
        weights = (None if w is None else given[0], None if pe is None else given[-1])
        return _by_reference(x, *weights, cu_seqlens, compress_type, kernel_size, kernel_stride)

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


def _static_values(
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
) -> tuple[Param, ...]:
    """The static parameters of a call, in their order."""
    columns = _columns(x, w, compress_type) if compress_type == "mlp" else 0
    return (compress_type, x.shape[2], kernel_size, kernel_stride, pe is not None, columns)


def _by_reference(
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
) -> Tensor:
    sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    if compress_type == "mlp" and w is not None:
        return reference.mlp_first_layer(x, w, pe, cu_seqlens, **sizes)
    return reference.compress(x, w, pe, cu_seqlens, compress_type=compress_type, **sizes)[0]


def _columns(x: Tensor, w: Tensor | None, compress_type: str) -> int:
    """Elements of a window's result: as of a token's, or an mlp's hidden ones."""
    return w.shape[-1] if compress_type == "mlp" and w is not None else x.shape[2]


def _allocate(x: Tensor, w: Tensor | None, compress_type: str, kernel_stride: int) -> Tensor:
    columns = _columns(x, w, compress_type)
    return x.new_empty((x.shape[0] // kernel_stride, x.shape[1], columns))


def _allocate_gradients(
    x: Tensor, w: Tensor | None, pe: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_w, d_pe = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (w, pe))
    return x.new_empty(x.shape), d_w, d_pe
