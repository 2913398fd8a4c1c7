"""Repeating a kernel's launch at a fraction of its cost on the host.

A `launch` computes grids and strides, and Triton then looks at every argument anew to find the
compiled kernel: tens of microseconds, and for calls that differ in nothing but the addresses of
their tensors all of it gives what it gave before. So the first of such calls is recorded as it
runs, and the others hand the new addresses to the kernels that it launched.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Launch = Callable[..., None]

_ALIGNMENT = 16
"""Bytes. Triton compiles a kernel for which of its pointers are multiples of this."""

_data_ptr = torch.Tensor.data_ptr


class ReplayedLaunch:
    """A generated kernel's `launch`, for calls alike in all but the addresses of their tensors.

    The caller sees to it that they are: that shapes, strides, dtypes, devices and all other
    arguments agree with the first call's, and that it runs on the tensors' device. What cannot be
    repeated is launched as ever: by a `launch` that does more than allocate and launch, for
    addresses that are aligned in another way, and while a profiler has hooks in Triton.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._recording: _Recording | None = None
        self._recorded = False

    def __call__(self, *args: object) -> None:
        if not self._recorded:
            self._recording = record(self._launch, args)
            self._recorded = True
        elif self._recording is None or not self._recording.replay(args):
            self._launch(*args)


@dataclass(frozen=True)
class _Kernel:
    """A compiled kernel, its grid, and where its arguments stand among a call's values."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    function: Any
    metadata: Any
    arguments: operator.itemgetter[Any]


@dataclass(frozen=True)
class _Workspace:
    """Memory that a launch allocates, and where in it the kernels' tensors start."""

    size: int
    device: torch.device
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class _Recording:
    """The kernels of one call, by values: addresses, constants, then addresses of workspaces."""

    tensors: operator.itemgetter[Any]
    constants: tuple[object, ...]
    workspaces: tuple[_Workspace, ...]
    kernels: tuple[_Kernel, ...]
    stream: Callable[[], int]

    def replay(self, args: tuple[Any, ...]) -> bool:
        """Launch the kernels on a call's tensors; returns whether that was possible."""
        addresses = [*map(_data_ptr, self.tensors(args))]
        if functools.reduce(operator.or_, addresses) % _ALIGNMENT or _hooked():
            return False
        values = [*addresses, *self.constants]
        memory = []  # until all kernels are in the stream's queue
        for workspace in self.workspaces:
            memory.append(torch.empty(workspace.size, dtype=torch.uint8, device=workspace.device))
            start = memory[-1].data_ptr()
            values += [start + offset for offset in workspace.offsets]
        stream = self.stream()
        for kernel in self.kernels:
            kernel.run(
                *kernel.grid,
                stream,
                kernel.function,
                kernel.metadata,
                *(None, None, None),  # no hooks
                *kernel.arguments(values),
            )
        return True


def record(launch: Launch, args: tuple[object, ...]) -> _Recording | None:
    """Run a call of `launch`; returns how to repeat it, or None where that cannot be known.

    What is repeated must follow from shapes, strides and dtypes alone. A `launch` that computes
    anything on tensors is none of these, and so it is watched for what it does beside launching.
    """
    from triton import JITFunction

    calls: list[_Call] = []
    names = getattr(launch, "__globals__", {})
    kernels = {n: v for n, v in names.items() if isinstance(v, JITFunction)}
    if not kernels or not isinstance(launch, types.FunctionType):
        launch(*args)
        return None
    shadow = dict(names)
    for name, value in names.items():
        if isinstance(value, types.FunctionType) and value.__globals__ is names:
            shadow[name] = _with_globals(value, shadow)
    shadow.update({name: _Recorder(kernel, calls) for name, kernel in kernels.items()})
    with _Watch() as watch:
        _with_globals(launch, shadow)(*args)
    return _recording_of(calls, args, watch.allocated) if watch.only_allocated else None


@dataclass(frozen=True)
class _Call:
    """A kernel call that a `launch` made: what was compiled for it, and its arguments in order."""

    compiled: Any
    grid: Any
    args: tuple[object, ...]


@dataclass(frozen=True)
class _Recorder:
    """Stands in for a kernel: launches it and notes how."""

    kernel: Any
    calls: list[_Call]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def call(*args: object, **named: object) -> None:
            compiled = self.kernel[grid](*args, **named)
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            ordered = (values.get(p.name, p.default) for p in self.kernel.params)
            self.calls.append(_Call(compiled, grid, tuple(ordered)))

        return call


class _Watch(TorchDispatchMode):
    """Sees the PyTorch operations of a launch: allocations and views of them can be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.only_allocated = True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.allocated.append(result)
        elif not func.is_view:
            self.only_allocated = False
        return result


def _recording_of(
    calls: list[_Call], args: tuple[object, ...], allocated: list[Tensor]
) -> _Recording | None:
    """The recording of a call's kernels; None where an argument comes from nowhere known."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    inputs = [arg for arg in args if isinstance(arg, Tensor)]
    index = {id(tensor): number for number, tensor in enumerate(inputs)}
    memory = {tensor.untyped_storage().data_ptr(): tensor for tensor in allocated}
    offsets: dict[int, list[int]] = {start: [] for start in memory}
    constants: list[object] = []
    sources: list[list[tuple[str, int, int]]] = []
    for call in calls:
        if not _repeatable(call):
            return None
        sources.append([])
        for value in call.args:
            if not isinstance(value, Tensor):
                sources[-1].append(("constant", 0, len(constants)))
                constants.append(value)
            elif id(value) in index:
                sources[-1].append(("input", 0, index[id(value)]))
            else:
                start = value.untyped_storage().data_ptr()
                if start not in memory:
                    return None
                sources[-1].append(("workspace", start, len(offsets[start])))
                offsets[start].append(int(value.storage_offset()) * value.element_size())
    if len(places) < 2 or any(tensor.data_ptr() % _ALIGNMENT for tensor in inputs):
        return None
    first = {("input", 0): 0, ("constant", 0): len(inputs)}
    total = len(inputs) + len(constants)
    for start, each in offsets.items():
        first["workspace", start] = total
        total += len(each)
    return _Recording(
        tensors=operator.itemgetter(*places),
        constants=tuple(constants),
        workspaces=tuple(
            _Workspace(memory[start].untyped_storage().nbytes(), memory[start].device, tuple(each))
            for start, each in offsets.items()
        ),
        kernels=tuple(
            _Kernel(
                call.compiled.run,
                tuple([*call.grid, 1, 1][:3]),
                call.compiled.function,
                call.compiled.packed_metadata,
                operator.itemgetter(*(first[kind, start] + n for kind, start, n in source)),
            )
            for call, source in zip(calls, sources, strict=True)
        ),
        stream=_stream_of(inputs[0]),
    )


def _repeatable(call: _Call) -> bool:
    """Whether a kernel call can be made again without Triton's JIT."""
    parts = ("run", "function", "packed_metadata")
    known = all(getattr(call.compiled, part, None) is not None for part in parts)
    return known and isinstance(call.grid, tuple) and len(call.args) > 1


def _stream_of(tensor: Tensor) -> Callable[[], int]:
    """Asks for the current stream of a tensor's device, as Triton does."""
    from triton.runtime import driver

    active: Any = driver.active
    return functools.partial(active.get_current_stream, max(0, tensor.get_device()))


def _hooked() -> bool:
    """Whether somebody wants to know of every launch."""
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
