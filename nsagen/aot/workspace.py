"""Memory that a kernel's `launch` allocates besides inputs and outputs, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen.aot.compile import recording
from nsagen.cases.base import Sizes, cases_of
from nsagen.core.importing import import_file
from nsagen.core.workload import Workload


class _Allocations(TorchDispatchMode):
    """Sums the bytes of every new storage; counts nothing as freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._kept: list[torch.Tensor] = []  # so that no storage's identity is reused
        self._known: set[int] = set()

    def knows(self, *tensors: object) -> None:
        """Exclude these from the count."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage()._cdata)
                self._kept.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self.bytes += storage.nbytes()
                    self.knows(tensor)
        return made


def workspace_bytes(path: Path, workload: Workload, sizes: Sizes) -> int:
    """Bytes that one call of a kernel file's `launch` allocates: an upper bound of what it holds.

    Args:
        path: the kernel file.
        sizes: of the call, which runs on the device "meta": no size is too large.
    """
    module = import_file(path)
    case = cases_of(workload).make_case(workload, sizes, "meta")
    allocations = _Allocations()
    allocations.knows(*case.args)
    with recording(module), allocations:
        module.launch(*case.args)
    return allocations.bytes
