"""Where a call runs, and launching its kernel: what all custom ops share."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.workload import DTYPES, Param, Workload, parameter_names
from nsagen.runtime import Dispatcher
from nsagen.runtime import dispatcher as registry
from nsagen.runtime.device import interpreting
from nsagen.runtime.dispatcher import Launch


def on_kernels(x: Tensor) -> bool:
    """Whether a call on `x` runs kernels: on GPUs, and on CPUs where Triton interprets.

    float64 has no kernels; on a CPU it always takes the reference.
    """
    return x.is_cuda or (interpreting() and x.dtype is not torch.float64)


def key_of(dispatcher: Dispatcher | None) -> str:
    """What a custom op carries for a dispatcher."""
    return registry.DEFAULT if dispatcher is None else dispatcher.key


def scale_of(softmax_scale: float | None, q: Tensor) -> float:
    """The given softmax scale, or 1/sqrt(head_dim)."""
    if softmax_scale is None:
        try:
            return q.size(-1) ** -0.5
        except (IndexError, ZeroDivisionError):
            return 1.0  # such a q is refused later
    if not 0.0 < softmax_scale < math.inf:
        raise InvalidInputError(
            "softmax_scale: must be positive and finite; "
            f"got {softmax_scale}; leave it out for 1/sqrt(head_dim)"
        )
    return softmax_scale


def lse_dtype(q: Tensor) -> torch.dtype:
    """Of softmax statistics: float32, or float64 for float64 inputs (CPU only)."""
    return torch.promote_types(q.dtype, torch.float32)


def launch(
    dispatcher: str,
    op: str,
    pass_: str,
    values: tuple[Param, ...],
    args: tuple[object, ...],
    context: int | None = None,
) -> None:
    """Launch the kernel of a workload.

    Args:
        dispatcher: the dispatcher's key.
        values: the static parameters in the order of `parameter_names`; the last ones may be
            left out where they say nothing.
        args: of the kernel's `launch`; the first is the main input, whose rows are the
            call's tokens.
        context: for decoding, the tokens that a cache slot holds at most.

    Raises:
        InvalidInputError: the dtype has no kernels.
        UnsupportedWorkloadError: no variant covers the call, and none may or can be built.
    """
    x = args[0]
    assert isinstance(x, Tensor)
    run_kernel(find_kernel(dispatcher, op, pass_, values, x, context), x, args)


def find_kernel(
    dispatcher: str,
    op: str,
    pass_: str,
    values: tuple[Param, ...],
    x: Tensor,
    context: int | None = None,
) -> Launch:
    """The `launch` of the kernel that serves a call, found by sizes alone; see `launch`.

    Args:
        x: the main input, whose rows are the call's tokens.
    """
    if x.shape[0] == 0:
        return _launch_nothing
    workload = _workload(op, pass_, x.dtype, values)
    return registry.lookup(dispatcher).launcher(workload, x.device, x.shape[0], context)


def run_kernel(kernel: Launch, x: Tensor, args: tuple[object, ...]) -> None:
    """Call a kernel's `launch` with the device of x as the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel(*args)
    else:
        kernel(*args)


def with_contiguous_rows(gradient: Tensor) -> Tensor:
    """A gradient as kernels take it: autograd may hand one back in any layout."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def _launch_nothing(*args: object) -> None:
    """Serves calls without tokens."""


def no_backward(op: str, x: Tensor) -> UnsupportedWorkloadError:
    """The error of a backward pass on a device that has no kernels for it."""
    return UnsupportedWorkloadError(
        f"{op}: gradients need a kernel for the backward pass, and there is none yet; got "
        f"tensors on {x.device}; wrap inference in torch.no_grad(), or train on the CPU"
    )


def no_chunk_backward(op: str) -> UnsupportedWorkloadError:
    """The error of a backward pass through a chunk of a longer prompt."""
    return UnsupportedWorkloadError(
        f"{op}: gradients need whole sequences; got q_start or cu_seqlens_k, which serve chunks "
        "of a prompt; wrap inference in torch.no_grad(), or train on whole sequences"
    )


@functools.cache
def _workload(op: str, pass_: str, dtype: torch.dtype, values: tuple[Param, ...]) -> Workload:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidInputError(
            f"{op}: kernels take {', '.join(DTYPES)}; got {name}; "
            "convert the tensors, or move them to the CPU for the reference"
        )
    params = dict(zip(parameter_names(op, pass_), values, strict=False))
    return Workload.of(op, pass_, dtype=name, **params)
