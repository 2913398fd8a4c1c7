"""When two schedules are the same: same kernels, called in the same way.

Knobs often change nothing: a loop too short to pipeline, a tile cut down to the problem. Such
schedules take the same time, so only the first is measured.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen.aot.compile import RecordedLaunch

_NOT_CODE = re.compile(r"^\s*(?://|\.loc|\.file|\$L__tmp\d+:).*\n?|\s*//.*", re.MULTILINE)


class HostCalls(TorchDispatchMode):
    """Records what a launch asks of PyTorch besides its kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.noted.append(f"{func} {_shown(args)} {_shown(kwargs or {})}")
        return func(*args, **(kwargs or {}))


def identity_of(
    variant: str, calls: Sequence[RecordedLaunch], compiled: Sequence[Any], host: Sequence[str]
) -> str:
    """16 hex digits over the assembly, grids and arguments of a launch's kernels.

    Args:
        variant: its name, which its kernels carry in theirs.
        compiled: Triton's compiled kernel of each call.
        host: what else the launch does, as `HostCalls` records it.
    """
    digest = hashlib.sha256(json.dumps(list(host)).encode())
    for call, kernel in zip(calls, compiled, strict=True):
        assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        digest.update(code_of(assembly, variant).encode())
        given = [
            _shown(call.args[param.name])
            for param in call.kernel.params
            if not param.is_constexpr  # those are in the assembly
        ]
        launched = [call.grid, kernel.metadata.num_warps, kernel.metadata.shared]
        digest.update(json.dumps([*launched, given], default=str).encode())
    return digest.hexdigest()[:16]


def code_of(assembly: str, variant: str) -> str:
    """Assembly without its kernel's name, comments and debug notes."""
    code, _, _ = assembly.replace(variant, "kernel").partition("\t.section\t.debug")
    return _NOT_CODE.sub("", code)


def _shown(value: Any) -> str:
    """An argument as text; a tensor as its layout."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()}"
    if isinstance(value, (list, tuple)):
        return str([_shown(item) for item in value])
    if isinstance(value, dict):
        return str({key: _shown(item) for key, item in value.items()})
    return str(value)
