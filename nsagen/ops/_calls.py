"""What decoding calls of one op need, checked and looked up once for all calls that look alike.

A decoding step makes a few calls a layer, each of a few microseconds on the device. Their checks
see nothing of a tensor but its shape, strides, dtype and device, and so does the dispatcher: a
call that agrees with an earlier one in all of these needs neither again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Kernel = Callable[..., None]

_MAX_CALLS = 4096
_shape_and_dtype = operator.attrgetter("shape", "dtype")


def signature(tensors: list[Tensor], *rest: Hashable) -> Hashable:
    """All that a call's checks and dispatch depend on.

    Args:
        tensors: of the call; a device is told by its index, which a CPU has not.
        rest: the other arguments, and which tensors are None.
    """
    return (
        *map(_shape_and_dtype, tensors),
        *map(torch.Tensor.stride, tensors),
        *map(torch.Tensor.get_device, tensors),
        *rest,
    )


class KnownCalls:
    """The kernels of calls that were found right, by their signature."""

    def __init__(self) -> None:
        self._kernels: dict[Hashable, Kernel] = {}
        self.get = self._kernels.get

    def add(self, call: Hashable, kernel: Kernel) -> Kernel:
        """Remember a call; whoever has seen too many different ones forgets them all."""
        if len(self._kernels) >= _MAX_CALLS:
            self._kernels.clear()
        self._kernels[call] = kernel
        return kernel
