"""Where a call runs and which kernel serves it: shared by all custom ops."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import CACHE_DTYPES, DTYPES, Param, Workload
from nsagen.runtime import Dispatcher
from nsagen.runtime import dispatcher as registry
from nsagen.runtime.device import interpreting, target_of
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
    if isinstance(softmax_scale, Tensor) or not 0.0 < softmax_scale < math.inf:
        raise InvalidInputError(
            "softmax_scale: must be positive and finite, a number; "
            f"got {softmax_scale}; leave it out for 1/sqrt(head_dim)"
        )
    return softmax_scale


def lse_dtype(q: Tensor) -> torch.dtype:
    """The dtype of softmax statistics: float32, or float64 for float64 inputs (CPU only)."""
    return torch.promote_types(q.dtype, torch.float32)


def find_kernel(
    dispatcher: str,
    op: str,
    pass_: str,
    params: Mapping[str, Param],
    x: Tensor,
    context: int | None = None,
) -> Launch:
    """The `launch` of the kernel that serves a call, by its sizes.

    Args:
        dispatcher: the dispatcher's key.
        params: the static parameters; optional ones may be left out where they say nothing.
        x: the main input, whose rows are the call's tokens.
        context: for decoding, the tokens that a cache slot holds at most.

    Raises:
        InvalidInputError: the dtype has no kernels.
        UnsupportedWorkloadError: no variant covers the call, and none may or can be built.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype in CACHE_DTYPES:  # only the scales beside it have a dtype to compute in
        dtype = "float32"
    if dtype not in DTYPES:
        raise InvalidInputError(
            f"{op}: kernels take {', '.join(DTYPES)}; got {dtype}; "
            "convert the tensors, or move them to the CPU for the reference"
        )
    workload = Workload.of(op, pass_, dtype=dtype, **params)
    return registry.lookup(dispatcher).launcher(workload, x.device, x.shape[0], context)


def has_kernel(
    dispatcher: str, op: str, pass_: str, params: Mapping[str, Param], x: Tensor
) -> bool:
    """Whether `find_kernel` finds a kernel that not every GPU has; the interpreter has none."""
    dtype = str(x.dtype).removeprefix("torch.")
    if not on_kernels(x) or interpreting() or dtype not in DTYPES:
        return False
    workload = Workload.of(op, pass_, dtype=dtype, **params)
    return registry.lookup(dispatcher).has(workload, x.device)


def fixed_kernel(name: str, x: Tensor) -> Launch | None:
    """The `launch` of a kernel that is not generated; None if Triton can't run on x's device,
    because the interpreter was chosen too late."""
    from nsagen.ops import _fixed_kernels

    if not _fixed_kernels.runs_on(x):
        return None
    return registry.one_at_a_time(getattr(_fixed_kernels, name))


def narrow_kernel(name: str, cache: Tensor) -> Launch | None:
    """`fixed_kernel` for a cache of a narrow dtype; None too for a GPU that can't convert it."""
    known = KNOWN_TARGETS.get(target_of(cache.device)) if cache.is_cuda else None
    if known is not None and not known.holds(str(cache.dtype).removeprefix("torch.")):
        return None
    return fixed_kernel(name, cache)


def attention_sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """The static parameters that all attention has, of q [N, HQ, D] and k, v [R, HK, D | Dv]."""
    sizes = {"head_dim": q.shape[2], "v_head_dim": v.shape[2]}
    return {**sizes, "gqa_ratio": q.shape[1] // k.shape[1]}


def attention_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [N, HQ, Dv] and lse [N, HQ], to be written."""
    o = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return o, q.new_empty(q.shape[:2], dtype=lse_dtype(q))


def with_contiguous_rows(gradient: Tensor) -> Tensor:
    """The gradient in a layout that kernels take; autograd may return any."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def no_backward(op: str, x: Tensor) -> UnsupportedWorkloadError:
    """The error of a backward pass on a device that has no kernels for it."""
    return UnsupportedWorkloadError(
        f"{op}: gradients need a kernel for the backward pass, and there is none yet; got "
        f"tensors on {x.device}; wrap inference in torch.no_grad(), or train on the CPU"
    )
