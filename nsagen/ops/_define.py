"""Defining the ops of decoding, whose calls are counted in microseconds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nsagen.ops._calls import KnownCalls
from nsagen.ops._launch import on_kernels

try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack
except ImportError:  # a release that tells these otherwise: never past the dispatcher
    peek_interpreter_stack = None


def define_op(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    calls: KnownCalls,
    mutates: Sequence[str] = (),
) -> Callable[..., Any]:
    """Register nsagen::`name`, computed by `function`; returns what to call, by position.

    A call like one that `calls` knows runs at once, and past PyTorch's dispatcher too unless
    somebody wants to see it there: a compiler, a mode, autograd, a transform or a profiler.

    Args:
        name: of the op.
        function: annotated fully, as the schema is read from it; teaches `calls`.
        fake: makes the outputs without computing them.
        calls: of this op.
        mutates: parameters that are written to.
    """
    qualified = f"nsagen::{name}"
    defaults = tuple(p.default for p in inspect.signature(function).parameters.values())

    def computed(*args: Any) -> Any:
        args += defaults[len(args) :]  # the dispatcher leaves out what is as by default
        known = calls.find(args) if on_kernels(args[0]) else None
        return function(*args) if known is None else known.run(args)

    torch.library.define(
        qualified, torch.library.infer_schema(function, mutates_args=tuple(mutates))
    )
    torch.library.impl(qualified, ("cpu", "cuda"), computed)
    torch.library.register_fake(qualified, fake)
    op = getattr(torch.ops.nsagen, name).default

    def call(*args: Any) -> Any:
        if unobserved() and on_kernels(args[0]):
            full = args + defaults[len(args) :]
            known = calls.find(full)
            if known is not None and not (known.requires_grad and torch.is_grad_enabled()):
                return known.run(full)
        return op(*args)

    return call


def unobserved() -> bool:
    """Whether a call of an op means to compute it now, and nothing else.

    False where torch.compile or a tracer looks on, a mode or a transform is on, or a profiler,
    which names ops. Whether gradients are recorded a call's tensors tell.
    """
    return not (
        torch.compiler.is_compiling()
        or peek_interpreter_stack is None
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )
