"""Runs a foreign implementation of an op through the cases that nsagen's own kernels must pass.

`nsagen verify --implementation module:function --op OP` calls a function with the public
signature of one of these ops, and compares its results, gradients and behaviour with the float64
reference:

    topk_sparse_attention(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale) -> o
    sliding_window_attention(q, k, v, window_size, cu_seqlens, softmax_scale) -> o
    compressed_attention(q, k, v, kernel_size, kernel_stride, block_size, topk, cu_seqlens_q,
        cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale, init_blocks, local_blocks)
        -> (o, topk_idx)

The function runs in a process of its own. If it crashes, hangs or leaves the GPU with an error that
every later call meets, it has failed that case, and the next case gets a fresh process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nsagen.core.errors import InvalidInputError
from nsagen.core.worker import Worker

if TYPE_CHECKING:
    from nsagen.cases.implementation.run import Row
    from nsagen.cases.implementation.setting import Setting

CASE_S = 300.0
"""Seconds that a case may take; a package may tune its kernels in the first one."""

_REMEDY = "put its folder on PYTHONPATH, or write an adapter"


def _rule(text: str) -> str:
    return f"verify: --implementation must be module:function that can be imported; got {text!r}"


def load_implementation(text: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        InvalidInputError: the module or function does not exist; the text says which.
    """
    module_name, _, name = text.partition(":")
    rule = _rule(text)
    try:
        function = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # a module may raise anything, or end the program
        said = f"{type(error).__name__}: {error}"
        raise InvalidInputError(f"{rule}: {said}; {_REMEDY}") from error
    if not callable(function):
        raise InvalidInputError(f"{rule}, which is no function; name one")
    return function


def verify_apart(
    text: str, op: str, setting: Setting, cases: Sequence[str] | None = None
) -> Iterator[Row]:
    """A row for each output of each case of the function that `module:function` names.

    It runs on the current GPU, or on the CPU without one.

    Args:
        cases: some of `suite.CASES`; None: all.

    Raises:
        InvalidInputError: the function cannot be imported, or the op has no contract.
    """
    shown = {name: os.environ[name] for name in ("TRITON_INTERPRET",) if name in os.environ}
    with contextlib.closing(Worker(f"{__name__}:Server", shown)) as worker:
        loaded = worker.ask("load", text, limit_s=CASE_S)
        if loaded.reason or loaded.value:
            raise InvalidInputError(loaded.value or f"{_rule(text)}: {loaded.reason}; {_REMEDY}")
        from nsagen.cases.implementation.suite import CASES
        from nsagen.cases.implementation.verify import check_op

        check_op(op)
        for name in CASES if cases is None else cases:
            reply = worker.ask("rows", text, op, setting, name, limit_s=CASE_S)
            if reply.reason:
                row = {"case": name, "output": "", "error": None, "threshold": None}
                yield row | {"result": "failed", "note": reply.reason}
            else:
                yield from reply.value


class Server:
    """Runs cases in a worker."""

    def load(self, text: str) -> str:
        """What is wrong with the name; empty if the function can be imported."""
        try:
            load_implementation(text)
        except InvalidInputError as error:
            return str(error)
        return ""

    def rows(self, text: str, op: str, setting: Setting, case: str) -> list[Row]:
        """A case's rows, once the GPU has done its work and answers."""
        import torch

        from nsagen.cases.implementation.verify import default_device, verify_implementation

        device = default_device()
        rows = list(verify_implementation(load_implementation(text), op, setting, device, (case,)))
        if device == "cuda":
            torch.cuda.synchronize()  # after an illegal access this and every later call fails
        return rows

    def is_broken_by(self, error: Exception) -> bool:
        return True  # what a foreign function raises is a row: any other error is the process's own
