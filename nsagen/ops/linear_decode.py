"""Decoding: a linear layer of few rows, and what follows it in the same launch.

At few rows a layer takes as long as reading its weights; every launch beside it, of an activation
or a sum, would take about as long as a hundredth of a layer. A norm before it is a launch of its
own all the same: each program would have to square and scale all of x, which took longer.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from nsagen.ops import reference
from nsagen.ops._checks import fail, tensors
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, on_kernels
from nsagen.runtime import Dispatcher

LINEAR_DECODE_ROWS = 64
"""The most rows that the kernel takes. It reads the weights once for all of them."""


def linear_decode(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
    sigmoid_from: int | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """act(norm(x) @ weight.T) + residual, for inference.

    Args:
        x: [R, K]; on a GPU at most LINEAR_DECODE_ROWS rows.
        weight: [N, K], contiguous.
        norm_weight: [K]: norm(x) = x / sqrt(mean(x^2) + eps) * norm_weight; None: norm(x) = x.
        eps: of the norm.
        residual: of the output's shape, or None.
        swiglu: the first N / 2 outputs are gates: act(y) = silu(gates) * others.
        sigmoid_from: outputs from this one on go through a sigmoid; None for none.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        [R, N], or [R, N / 2] with swiglu, in x's dtype.

    Raises:
        InvalidInputError: a tensor breaks the contract above.
    """
    settings = (swiglu, sigmoid_from, key_of(dispatcher))
    return _linear_decode(x, weight, norm_weight, float(eps), residual, *settings)


_check_tensors = tensors(
    x="[R, K]", weight="dense [N, K]", norm_weight="dense [K]", residual="[R, outputs]"
)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    swiglu: bool,
) -> None:
    outputs = weight.shape[0]
    if swiglu and outputs % 2:
        remedy = "put the gates' weights first, then the others'"
        fail(op, "swiglu needs an even number of outputs", outputs, remedy)
    wanted = (x.shape[0], outputs // (2 if swiglu else 1))
    if residual is not None and tuple(residual.shape) != wanted:
        fail(op, f"residual must be {wanted}", tuple(residual.shape), "pass the layer's input")
    if on_kernels(x) and x.shape[0] > LINEAR_DECODE_ROWS:
        rule = f"a kernel takes at most {LINEAR_DECODE_ROWS} rows"
        fail(op, rule, x.shape[0], "use torch.nn.functional.linear, which is made for more")


def _normed(x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    return x if norm_weight is None else functional.rms_norm(x, norm_weight.shape, norm_weight, eps)


def _allocate(x: Tensor, weight: Tensor, swiglu: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // (2 if swiglu else 1)))


_linear_decode = op_of(
    "linear_decode",
    reference.linear_decode,
    returns="y",
    allocate=_allocate,
    check=(_check_tensors, _check),
    kernel="linear decode",
    launch="x weight residual y swiglu sigmoid_from",
    prepare={"x": _normed},
)
