"""Records what a call allocates and launches, as a `Program` that repeats it."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen.runtime.replay import (
    ALIGNMENT,
    Allocate,
    Apply,
    Descriptor,
    Launch,
    Place,
    Program,
    Run,
    Step,
    meta_of,
    place_of,
    share_workspaces,
)

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_FILLED = {
    _aten.zeros.default: lambda size: 0,
    _aten.new_zeros.default: lambda x, size: 0,
    _aten.new_full.default: lambda x, size, value: value,
}
"""Allocations that are filled, and with what, by their arguments."""
_REPEATED: dict[Any, Callable[..., Tensor]] = {
    _aten.cumsum.default: torch.cumsum,
    _aten.zero_.default: Tensor.zero_,
    _aten.fill_.Scalar: Tensor.fill_,
}
"""PyTorch operations that a `launch` may use between kernels, since they read only tensors, and
functions that do the same at less cost."""


class Recorder:
    """Collects the steps of a call on some tensors as it runs.

    The caller ensures this of the calls that repeat them: shapes, strides, dtypes, devices and all
    other arguments agree with the recorded call's, and they run on the tensors' device.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = len(inputs)
        self._device = inputs[0].device if inputs else torch.device("cpu")
        self._slots: list[Tensor | None] = list(inputs)  # keeps ids and addresses from being reused
        self._of_id = {id(tensor): slot for slot, tensor in enumerate(inputs)}
        storages = Counter(tensor.untyped_storage().data_ptr() for tensor in inputs)
        # A view is a place in a tensor. Where inputs share memory, it could be one in either.
        self._of_storage = {
            storage: slot
            for slot, tensor in enumerate(inputs)
            if storages[storage := tensor.untyped_storage().data_ptr()] == 1 and storage
        }
        self._steps: list[Step] = []
        self._aligned: dict[int, None] = {}
        # With a tensor passed twice, a later use of it could mean either input.
        self._failed = not 1 <= len(inputs) == len(self._of_id)

    def fail(self) -> None:
        """Note that something happened that cannot be repeated."""
        self._failed = True

    def program(self, outputs: Iterable[Tensor]) -> Program | None:
        """The steps so far, with the outputs that they made; None if they cannot be repeated."""
        slots = [self._of_id.get(id(tensor), -1) for tensor in outputs]
        if self._failed or min(slots, default=0) < 0:
            return None
        steps, aligned = tuple(self._steps), tuple(self._aligned)
        program = Program(self._inputs, steps, tuple(slots), self._device, aligned)
        return share_workspaces(program)

    def allocated(self, tensor: Tensor) -> None:
        """Record a new tensor without content."""
        self._steps.append(Allocate(meta_of(tensor)))
        self._made(tensor)

    def applied(
        self, function: Callable[..., Tensor], args: tuple, named: Mapping[str, Any], result: Tensor
    ) -> None:
        """Record a function of whole tensors that returned a new one, or changed one in place."""
        places = [self._argument(arg) for arg in args]
        whole = all(
            slot is arg or (slot is not None and meta_of(slot) == meta_of(arg))
            for place, arg in zip(places, args, strict=True)
            if isinstance(place, Place)
            for slot in [self._slots[place.slot]]
        )
        if not whole:
            return self.fail()
        new = id(result) not in self._of_id
        self._steps.append(Apply(function, tuple(places), named, new))
        if new:
            self._made(result)
        return None

    def run(self, launch: Launch, args: Sequence[Any]) -> None:
        """Run a generated kernel's `launch`, and record what it allocates and launches.

        What is repeated must follow from shapes, strides and dtypes alone. A `launch` that computes
        anything else on tensors does not qualify, so all that it does is watched.
        """
        from triton import JITFunction

        names = getattr(launch, "__globals__", {})
        kernels = {n: v for n, v in names.items() if isinstance(v, JITFunction)}
        if not kernels or not isinstance(launch, types.FunctionType):
            self.fail()
            return launch(*args)
        shadow = dict(names)
        for name, value in names.items():
            if isinstance(value, types.FunctionType) and value.__globals__ is names:
                shadow[name] = _with_globals(value, shadow)
        shadow.update({n: _RecordedKernel(kernel, self) for n, kernel in kernels.items()})
        before = len(self._slots)
        with _Watch(self):
            _with_globals(launch, shadow)(*args)
        shadow.clear()  # breaks a cycle that would keep the recorder's tensors alive
        self._let_go(before)
        return None

    def let_go(self, tensor: Tensor) -> None:
        """Keep no reference to an input, which the call does not use from now on."""
        slot = self._of_id.pop(id(tensor), None)
        if slot is not None:
            self._of_storage.pop(tensor.untyped_storage().data_ptr(), None)
            self._slots[slot] = None

    def _made(self, tensor: Tensor) -> None:
        """Note the tensor of the next slot."""
        self._of_id[id(tensor)] = len(self._slots)
        self._of_storage[tensor.untyped_storage().data_ptr()] = len(self._slots)
        self._slots.append(tensor)

    def _let_go(self, first: int) -> None:
        """Free the workspaces of a `launch` that has returned: all slots from one on."""
        self._of_id = {key: slot for key, slot in self._of_id.items() if slot < first}
        self._of_storage = {key: slot for key, slot in self._of_storage.items() if slot < first}
        self._slots[first:] = [None] * (len(self._slots) - first)

    def launched(self, compiled: Any, grid: Any, args: Sequence[Any], specialized: Any) -> None:
        """Record a launch.

        Args:
            specialized: for each argument, whether the kernel was compiled for its alignment.
        """
        parts = ("run", "function", "packed_metadata")
        known = all(getattr(compiled, part, None) is not None for part in parts)
        places = tuple(self._argument(arg) for arg in args)
        if not known or not isinstance(grid, tuple) or len(places) < 2:
            return self.fail()
        for place, special in zip(map(place_of, places), specialized, strict=True):
            tensor = self._slots[place.slot] if place is not None and special else None
            if place is None or tensor is None:
                continue
            if tensor.data_ptr() % ALIGNMENT:
                return self.fail()
            if place.slot < self._inputs:
                self._aligned[place.slot] = None
        self._steps.append(Run(compiled, tuple([*grid, 1, 1][:3]), places))
        return None

    def _argument(self, value: Any) -> Any:
        """An argument with its tensors replaced by places."""
        if isinstance(value, Tensor):
            place = self._place(value)
            if place is None:
                self.fail()
            return place
        if hasattr(value, "base") and hasattr(value, "block_shape"):
            fields = {name: part for name, part in vars(value).items() if name != "base"}
            return Descriptor(type(value), fields, self._argument(value.base))
        if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
            self.fail()
        return value

    def _place(self, tensor: Tensor) -> Place | None:
        slot = self._of_id.get(id(tensor))
        if slot is not None:
            return Place(slot)
        slot = self._of_storage.get(tensor.untyped_storage().data_ptr())
        whole = None if slot is None else self._slots[slot]
        if slot is None or whole is None:
            return None
        return Place(slot, _offset(tensor) - _offset(whole))


def _offset(tensor: Tensor) -> int:
    """Bytes from the start of its storage; a tensor without elements has address 0."""
    return int(tensor.storage_offset()) * tensor.element_size()


@dataclass(frozen=True)
class _RecordedKernel:
    """Stands in for a kernel: launches it and records how."""

    kernel: Any
    recorder: Recorder

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def call(*args: object, **named: object) -> None:
            compiled = self.kernel[grid](*args, **named)
            names = self.kernel.arg_names[: len(args)]
            values = dict(zip(names, args, strict=True)) | named
            params = self.kernel.params
            ordered = [values.get(p.name, p.default) for p in params]
            specialized = [not p.do_not_specialize_on_alignment for p in params]
            self.recorder.launched(compiled, grid, ordered, specialized)

        return call


class _Watch(TorchDispatchMode):
    """Records the PyTorch operations of a `launch`; only a few can be repeated."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._recorder.allocated(result)
        elif func in _FILLED:
            self._recorder.allocated(result)
            self._recorder.applied(Tensor.fill_, (result, _FILLED[func](*args)), {}, result)
        elif func in _REPEATED:
            self._recorder.applied(_REPEATED[func], args, kwargs or {}, result)
        elif not func.is_view:
            self._recorder.fail()
        return result


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
