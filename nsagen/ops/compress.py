"""Compression of keys and values, before rope: window i covers tokens [i*s, i*s + l).

With x' = x + pe: `avgpool` is the mean of x', `weightedpool` sum_j w[h, j] x'_j, `sigmoid_mul`
2/l sum_j sigmoid(w[h, j] . x'_j) x'_j, `linear` flatten(x') @ w[h], and `mlp`
silu(flatten(x') @ w1[h]) @ w2[h], whose custom op is the product with w1 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.ops import reference
from nsagen.ops._checks import (
    check_compress_weights,
    check_cu_seqlens,
    check_forms,
    check_tensors,
)
from nsagen.ops._derive import Gradients, backward_of
from nsagen.ops._launch import key_of
from nsagen.ops._op import apply, define_op
from nsagen.ops.lengths import Lengths, lengths_of
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
    lengths: Lengths | None = None,
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
        lengths: prepared ones of this batch; made here by default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        y [N // kernel_stride, HK, D], zeros past the last window, differentiable in x, w and
        pe; and y_cu_seqlens int32 [batch + 1].

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    lengths = lengths_of(_OP, cu_seqlens, (kernel_size, kernel_stride), lengths, x=x)
    ends, sizes = lengths.window_cu_seqlens, (kernel_size, kernel_stride, key_of(dispatcher))
    return compress_windows(x, w, pe, cu_seqlens, ends, compress_type, *sizes), ends


def compress_windows(
    x: Tensor,
    w: Weight,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    y_cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    dispatcher: str,
) -> Tensor:
    """y of `compress`, with the windows' offsets known."""
    sizes = (cu_seqlens, y_cu_seqlens, compress_type, kernel_size, kernel_stride, dispatcher)
    if compress_type != "mlp" and not isinstance(w, tuple):
        return compress_forward(x, w, pe, *sizes)
    check_forms(_OP, {"x": x})
    check_compress_weights(_OP, x, w, pe, compress_type, kernel_size)
    assert isinstance(w, tuple)
    return apply(_second_layer, compress_forward(x, w[0], pe, *sizes), w[1])


def _second_layer(before: Tensor, w2: Tensor) -> Tensor:
    """silu(before) @ w2, [M, HK, H] and [HK, H, D] to [M, HK, D].

    By PyTorch, gradients too: it is 1/kernel_size of the first layer's work, and those need
    `before` as it is. Rows without a window are zeros before and after.
    """
    with torch.autocast(before.device.type, enabled=False):
        return torch.bmm(functional.silu(before).transpose(0, 1), w2).transpose(0, 1)


def _check(
    op: str,
    x: Tensor,
    w: Tensor | None,
    pe: Tensor | None,
    cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
) -> None:
    check_cu_seqlens(op, "cu_seqlens", cu_seqlens, x)
    if compress_type != "mlp":  # its two weights were checked together
        check_compress_weights(op, x, w, pe, compress_type, kernel_size)


def _columns(x: Tensor, w: Tensor | None, compress_type: str) -> int:
    """Elements of a window's result: those of a token, or the hidden ones of an mlp."""
    return w.shape[-1] if compress_type == "mlp" and w is not None else x.shape[2]


def _allocate(x: Tensor, w: Tensor | None, compress_type: str, kernel_stride: int) -> Tensor:
    columns = _columns(x, w, compress_type)
    return x.new_empty((x.shape[0] // kernel_stride, x.shape[1], columns))


@define_op(
    returns="y",
    allocate=_allocate,
    check=(check_tensors, check_windows, _check),
    kernel="compress forward",
    sizes=lambda x, w, compress_type: {
        "mlp_hidden": _columns(x, w, compress_type) if compress_type == "mlp" else 0
    },
    launch="x w pe cu_seqlens y_cu_seqlens y",
    gradients=Gradients("x w pe", "dy x w pe cu_seqlens y_cu_seqlens dx dw dpe"),
)
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
    sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    if compress_type == "mlp" and w is not None:
        return reference.mlp_first_layer(x, w, pe, cu_seqlens, **sizes)
    return reference.compress(x, w, pe, cu_seqlens, compress_type=compress_type, **sizes)[0]


compress_backward = backward_of(compress_forward)
