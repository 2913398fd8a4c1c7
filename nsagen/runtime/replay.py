"""Repeats kernel launches at a fraction of their cost on the host.

A `launch` computes grids, strides and workspaces, and Triton then examines every argument again
to find the compiled kernel: tens of microseconds a kernel. For calls that differ only in the
addresses of their tensors, all of this gives the same result. So one such call is recorded while
it runs, and the others pass the new addresses to the kernels that it launched.

A `Program` is such a recording: allocations, launches and a few PyTorch operations in order.
Programs of several calls join into one, whose tensors are found only by name of place.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Launch = Callable[..., None]
Meta = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype."""

_ALIGNMENT = 16
"""Bytes. Triton compiles a kernel for which of its pointers are multiples of this."""

_data_ptr = torch.Tensor.data_ptr
_empty_strided_cuda = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)
_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_REPEATED = {
    _aten.zeros.default,
    _aten.new_zeros.default,
    _aten.new_full.default,
    _aten.cumsum.default,
    _aten.zero_.default,
    _aten.fill_.Scalar,
}
"""PyTorch operations that a `launch` may use between kernels: they read only tensors."""


@dataclass(frozen=True)
class Place:
    """Where a pointer goes: an offset in bytes into the tensor of a slot.

    The first slots hold a program's inputs, the others what its steps make, in order.
    """

    slot: int
    offset: int = 0


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor of a bulk copy: everything except the address of its tensor."""

    kind: type
    fields: Mapping[str, Any]
    base: Place


@dataclass(frozen=True)
class Allocate:
    """A step that makes the next slot's tensor."""

    meta: Meta


@dataclass(frozen=True)
class Run:
    """A step that launches a compiled kernel; arguments are places, descriptors or constants."""

    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Apply:
    """A step that calls PyTorch on the tensors of whole slots."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    named: Mapping[str, Any]
    makes_slot: bool


Step = Allocate | Run | Apply


@dataclass(frozen=True)
class Program:
    """Steps that repeat a call.

    Attributes:
        inputs: how many tensors it takes.
        outputs: the slots of the tensors that it returns.
        device: where the tensors are; None for a CPU.
    """

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    device: torch.device
    _run: Callable[..., list[Tensor] | None] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_run", functools.partial(_repeat, *_compiled(self)))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Launch the kernels on a call's tensors; returns the outputs, or None if that is
        impossible: addresses with another alignment, or a profiler's hooks in Triton."""
        return self._run(tensors)


@dataclass(slots=True)
class _Base:
    """Stands for a tensor in a descriptor: an address."""

    address: int

    def data_ptr(self) -> int:
        return self.address


Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def allocator(device: torch.device) -> Empty:
    """Makes empty tensors by shape, strides and dtype; a GPU must be the current device."""
    if device.type == "cuda" and _empty_strided_cuda is not None:
        return _empty_strided_cuda
    kind = torch.device(device.type)

    def empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=kind)

    return empty


def _compiled(program: Program) -> tuple[Any, ...]:
    """What `_repeat` needs besides the tensors: steps on flat lists of values and tensors.

    `values` holds the inputs' addresses, the constants and then, as steps make them, the slots'
    addresses (one for each offset in use) and maps of bulk copies.
    """
    makers = {}  # slot -> the step that makes it
    for step in program.steps:
        if isinstance(step, Allocate) or (isinstance(step, Apply) and step.makes_slot):
            makers[program.inputs + len(makers)] = step
    offsets: dict[int, list[int]] = {}
    for step in program.steps:
        for place in map(place_of, step.args) if isinstance(step, Run) else ():
            if place is not None and place.offset not in offsets.setdefault(place.slot, []):
                offsets[place.slot].append(place.offset)
    inputs = range(program.inputs)
    aligned = [slot for slot in inputs if slot in offsets] or [0]
    moved = [(slot, n) for slot in inputs for n in offsets.get(slot, ()) if n]
    index: dict[Any, int] = {Place(slot): slot for slot in inputs}
    index |= {Place(*place): program.inputs + n for n, place in enumerate(moved)}
    count = program.inputs + len(moved)
    constants: list[Any] = []

    def constant(value: Any) -> int:
        constants.append(value)
        return count + len(constants) - 1

    expanded = iter([_expanded(step, constant) for step in program.steps if isinstance(step, Run)])
    count += len(constants)
    steps: list[Callable[[list[Any], list[Any], int, Empty], None]] = []
    last = _last_uses(program)
    slot = program.inputs
    for position, step in enumerate(program.steps):
        used: tuple[int, ...] | None = None
        if makers.get(slot) is step:
            used = tuple(offsets.get(slot, ()))
            index |= {Place(slot, offset): count + n for n, offset in enumerate(used)}
            count += len(used)
            slot += 1
        if isinstance(step, Allocate):
            steps.append(functools.partial(_allocate, step.meta, used or ()))
        elif isinstance(step, Apply):
            steps.append(functools.partial(_apply, step, used))
        else:
            launch, args, descriptors = next(expanded)
            picked = [index[arg] if isinstance(arg, Place) else arg for arg in args]
            for n, (place, _, _) in enumerate(descriptors):
                picked[place] = count + n
            makes = tuple((index[base], make) for _, base, make in descriptors)
            count += len(makes)
            each = _launch_described if makes else _launch
            pick = operator.itemgetter(*picked)
            steps.append(functools.partial(each, launch, step.grid, pick, *([makes] * bool(makes))))
        dead = tuple(s for s, use in last.items() if use == position)
        if dead:
            steps.append(functools.partial(_free, dead))
    return (
        tuple(steps),
        operator.itemgetter(*aligned, aligned[0]),
        tuple(moved),
        tuple(constants),
        program.outputs,
        _stream_of(program.device),
        allocator(program.device),
    )


Expanded = tuple[Callable[..., None], list[Any], list[tuple[int, Place, Callable[[int], Any]]]]


def _expanded(step: Run, constant: Callable[[Any], int]) -> Expanded:
    """How a kernel is launched, on which places and constants, and its bulk copies' descriptors.

    For a descriptor: its place among the arguments, the place of its tensor, and what makes it
    from the address.
    """
    compiled = step.compiled
    direct = _direct_launcher(compiled)
    launch, metas = direct or (_by_launcher(compiled), None)
    args: list[Any] = []
    descriptors = []
    for arg in step.args:
        if not isinstance(arg, Descriptor):
            args.append(arg if isinstance(arg, Place) else constant(arg))
        elif metas is None:
            make = functools.partial(_descriptor, arg.kind, dict(arg.fields))
            descriptors.append((len(args), arg.base, make))
            args.append(None)
        else:
            fields = arg.fields
            make = _map_maker(fields, metas[len(descriptors)])
            descriptors.append((len(args), arg.base, make))
            args += [None, *map(constant, (*fields["shape"], *fields["strides"]))]
    return launch, args, descriptors


def _by_launcher(compiled: Any) -> Callable[..., None]:
    """Launches through Triton's own launcher of a kernel."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(x: int, y: int, z: int, stream: int, *args: Any) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *args)

    return launch


def _direct_launcher(compiled: Any) -> tuple[Callable[..., None], list[dict[str, Any]]] | None:
    """What Triton 3.6's launcher of a kernel finally calls, and what it knows of descriptors.

    The launcher is Python: for each call it looks for memory that hardly any kernel needs, and
    takes descriptors apart. None if a launcher is not as expected.
    """
    run = compiled.run
    names = ("launch", "launch_cooperative_grid", "launch_pdl", "num_ctas")
    simple = type(run).__name__ == "CudaLauncher" and all(hasattr(run, name) for name in names)
    if not simple or hasattr(run, "arg_annotations"):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    launch, metas = run.launch, []
    if isinstance(launch, types.FunctionType):  # takes descriptors apart, then launches
        cells = (cell.cell_contents for cell in launch.__closure__ or ())
        held = dict(zip(launch.__code__.co_freevars, cells, strict=True))
        launch, metas = held.get("launcher"), held.get("tensordesc_meta")
        if launch is None or not metas or any(not m or m["fp4_padded"] for m in metas):
            return None
    function, metadata = compiled.function, compiled.packed_metadata
    before = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata)
    before = (*before, None, None, None)  # no launch metadata, no hooks

    def direct(x: int, y: int, z: int, stream: int, *args: Any) -> None:
        launch(x, y, z, stream, *before, *args)

    return direct, metas


_MAX_MAPS = 64


def _map_maker(fields: Mapping[str, Any], meta: dict[str, Any]) -> Callable[[int], Any]:
    """Makes what the GPU reads of a descriptor, from an address; keeps the last ones."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    active: Any = driver.active
    fill = active.utils.fill_tma_descriptor
    element = (meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]])
    padding = 1 if fields["padding"] == "nan" else 0
    rest = (*element, meta["block_size"], fields["shape"], fields["strides"], padding)
    maps: dict[int, Any] = {}

    def make(address: int) -> Any:
        found = maps.get(address)
        if found is None:
            if len(maps) >= _MAX_MAPS:
                maps.clear()
            found = maps[address] = fill(address, meta["swizzle"], *rest)
        return found

    return make


def _descriptor(kind: type, fields: dict[str, Any], address: int) -> Any:
    """A tensor descriptor as Triton's launcher takes it."""
    descriptor = object.__new__(kind)
    descriptor.__dict__.update(fields, base=_Base(address))
    return descriptor


def _last_uses(program: Program) -> dict[int, int]:
    """The last step that uses each slot made by a step, for those that are not returned."""
    last: dict[int, int] = {}
    slot = program.inputs
    for position, step in enumerate(program.steps):
        if isinstance(step, Allocate) or (isinstance(step, Apply) and step.makes_slot):
            last[slot] = position
            slot += 1
        for place in () if isinstance(step, Allocate) else map(place_of, step.args):
            if place is not None and place.slot in last:
                last[place.slot] = position
    return {slot: use for slot, use in last.items() if slot not in program.outputs}


def _repeat(
    steps: tuple[Callable[..., None], ...],
    aligned: Callable[[list[int]], tuple[int, ...]],
    moved: tuple[tuple[int, int], ...],
    constants: tuple[Any, ...],
    outputs: tuple[int, ...],
    stream_of: Callable[[], int],
    empty: Empty,
    tensors: Sequence[Tensor],
) -> list[Tensor] | None:
    values: list[Any] = [*map(_data_ptr, tensors)]
    if functools.reduce(operator.or_, aligned(values)) % _ALIGNMENT or _hooked():
        return None
    for slot, offset in moved:
        values.append(values[slot] + offset)
    values += constants
    slots: list[Any] = [*tensors]
    stream = stream_of()
    for step in steps:
        step(values, slots, stream, empty)
    return [slots[slot] for slot in outputs]


def _allocate(
    meta: Meta,
    offsets: tuple[int, ...],
    values: list[Any],
    slots: list[Any],
    stream: int,
    empty: Empty,
) -> None:
    tensor = empty(*meta)
    slots.append(tensor)
    address = _data_ptr(tensor)
    for offset in offsets:
        values.append(address + offset)


def _apply(
    step: Apply,
    offsets: tuple[int, ...] | None,
    values: list[Any],
    slots: list[Any],
    stream: int,
    empty: Empty,
) -> None:
    args = (slots[arg.slot] if isinstance(arg, Place) else arg for arg in step.args)
    tensor = step.function(*args, **step.named)
    if offsets is not None:
        slots.append(tensor)
        address = _data_ptr(tensor)
        values.extend(address + offset for offset in offsets)


def _free(
    dead: tuple[int, ...], values: list[Any], slots: list[Any], stream: int, empty: Empty
) -> None:
    for slot in dead:
        slots[slot] = None


def _launch(
    launch: Callable[..., None],
    grid: tuple[int, ...],
    pick: Callable[[list[Any]], tuple[Any, ...]],
    values: list[Any],
    slots: list[Any],
    stream: int,
    empty: Empty,
) -> None:
    launch(*grid, stream, *pick(values))


def _launch_described(
    launch: Callable[..., None],
    grid: tuple[int, ...],
    pick: Callable[[list[Any]], tuple[Any, ...]],
    makes: tuple[tuple[int, Callable[[int], Any]], ...],
    values: list[Any],
    slots: list[Any],
    stream: int,
    empty: Empty,
) -> None:
    for base, make in makes:
        values.append(make(values[base]))
    launch(*grid, stream, *pick(values))


class ReplayedLaunch:
    """A generated kernel's `launch`, for calls that differ only in the addresses of their tensors.

    The caller ensures this: shapes, strides, dtypes, devices and all other arguments agree with
    the first call's, and the call runs on the tensors' device. Calls that cannot be repeated are
    launched as usual: a `launch` that does more than allocate and launch, addresses with another
    alignment, and calls while a profiler has hooks in Triton.

    Args:
        after: calls to make before recording one. Recording takes a few times as long as a call and
            is wasted on calls that never come again.
    """

    def __init__(self, launch: Launch, after: int = 0) -> None:
        self._launch = launch
        self._plain = after
        self._recorded = False
        self.program: Program | None = None

    def __call__(self, *args: object) -> None:
        if self._plain > 0:
            self._plain -= 1
            self._launch(*args)
        elif not self._recorded:
            self.program = record(self._launch, args)
            self._recorded = True
        else:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if self.program is None or self.program.run(tensors) is None:
                self._launch(*args)


def record(launch: Launch, args: tuple[object, ...]) -> Program | None:
    """Run a call of `launch`; returns how to repeat it, or None if that cannot be known.

    The program takes the call's tensors in order. What is repeated must follow from shapes,
    strides and dtypes alone. A `launch` that computes anything else on tensors does not qualify,
    so the recorder watches what it does besides launching.
    """
    from triton import JITFunction

    names = getattr(launch, "__globals__", {})
    kernels = {n: v for n, v in names.items() if isinstance(v, JITFunction)}
    if not kernels or not isinstance(launch, types.FunctionType):
        launch(*args)
        return None
    recorder = Recorder([arg for arg in args if isinstance(arg, Tensor)])
    shadow = dict(names)
    for name, value in names.items():
        if isinstance(value, types.FunctionType) and value.__globals__ is names:
            shadow[name] = _with_globals(value, shadow)
    shadow.update({n: _RecordedKernel(kernel, recorder) for n, kernel in kernels.items()})
    with _Watch(recorder):
        _with_globals(launch, shadow)(*args)
    shadow.clear()  # its functions and it hold each other, and the recorder's tensors
    return recorder.program(())


class Recorder:
    """Collects the steps of a call on some tensors."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = list(inputs)
        self._slots: list[Tensor] = list(inputs)  # also keeps ids and addresses from being reused
        self._of_id = {id(tensor): slot for slot, tensor in enumerate(inputs)}
        self._of_storage: dict[int, int] = {}
        self._steps: list[Step] = []
        # A tensor that is passed twice has two places, and which one is meant is unknown.
        self._failed = not 1 <= len(inputs) == len(self._of_id)

    def fail(self) -> None:
        """Note that something happened that cannot be repeated."""
        self._failed = True

    def program(self, outputs: Iterable[Tensor]) -> Program | None:
        """The steps so far, with the outputs that they made."""
        slots = [self._of_id.get(id(tensor), -1) for tensor in outputs]
        if self._failed or min(slots, default=0) < 0:
            return None
        return Program(len(self._inputs), tuple(self._steps), tuple(slots), self._inputs[0].device)

    def made(self, tensor: Tensor) -> None:
        """Record the tensor of the next slot."""
        self._of_id[id(tensor)] = len(self._slots)
        self._of_storage[tensor.untyped_storage().data_ptr()] = len(self._slots)
        self._slots.append(tensor)

    def allocated(self, tensor: Tensor) -> None:
        self._steps.append(Allocate(meta_of(tensor)))
        self.made(tensor)

    def applied(
        self, function: Callable[..., Tensor], args: tuple, named: Mapping[str, Any], result: Tensor
    ) -> None:
        """Record a function of whole tensors that returned a new one, or changed one in place."""
        places = [self._argument(arg) for arg in args]
        whole = all(
            self._slots[place.slot] is arg or meta_of(self._slots[place.slot]) == meta_of(arg)
            for place, arg in zip(places, args, strict=True)
            if isinstance(place, Place)
        )
        if not whole:
            return self.fail()
        new = id(result) not in self._of_id
        self._steps.append(Apply(function, tuple(places), named, new))
        if new:
            self.made(result)
        return None

    def launched(self, compiled: Any, grid: Any, args: Iterable[Any]) -> None:
        parts = ("run", "function", "packed_metadata")
        known = all(getattr(compiled, part, None) is not None for part in parts)
        places = tuple(self._argument(arg) for arg in args)
        if not known or not isinstance(grid, tuple) or len(places) < 2:
            return self.fail()
        for place in map(place_of, places):
            start = 0 if place is None else self._slots[place.slot].data_ptr()
            if start % _ALIGNMENT:
                return self.fail()
        self._steps.append(Run(compiled, tuple([*grid, 1, 1][:3]), places))
        return None

    def called(
        self, program: Program | None, outputs: Iterable[Tensor], tensors: Sequence[Tensor]
    ) -> None:
        """Record a call that made some outputs, then ran a program on tensors including them."""
        if program is None:
            return self.fail()
        for output in outputs:
            self.allocated(output)
        return self._join(program, tensors)

    def _join(self, program: Program, tensors: Sequence[Tensor]) -> None:
        slots: list[Place] = []
        for tensor in tensors:
            place = self._argument(tensor)
            if not isinstance(place, Place):
                return self.fail()
            slots.append(place)

        def moved(arg: Any) -> Any:
            if isinstance(arg, Descriptor):
                return Descriptor(arg.kind, arg.fields, moved(arg.base))
            if not isinstance(arg, Place):
                return arg
            return Place(slots[arg.slot].slot, slots[arg.slot].offset + arg.offset)

        for step in program.steps:
            if isinstance(step, Allocate):
                self._steps.append(step)
            elif isinstance(step, Run):
                args = tuple(map(moved, step.args))
                self._steps.append(Run(step.compiled, step.grid, args))
            else:
                args = tuple(map(moved, step.args))
                if any(isinstance(arg, Place) and arg.offset for arg in args):
                    return self.fail()
                self._steps.append(Apply(step.function, args, step.named, step.makes_slot))
            if isinstance(step, Allocate) or (isinstance(step, Apply) and step.makes_slot):
                slots.append(Place(len(self._slots)))
                self._slots.append(self._inputs[0])  # a workspace: only this call uses it
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
        if slot is None:
            return None
        return Place(slot, _offset(tensor) - _offset(self._slots[slot]))


def place_of(arg: Any) -> Place | None:
    """Where the pointer of an argument goes, if it has one."""
    arg = arg.base if isinstance(arg, Descriptor) else arg
    return arg if isinstance(arg, Place) else None


def meta_of(tensor: Tensor) -> Meta:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _offset(tensor: Tensor) -> int:
    """Bytes into its storage; the address of a tensor without elements would be 0."""
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
            ordered = (values.get(p.name, p.default) for p in self.kernel.params)
            self.recorder.launched(compiled, grid, ordered)

        return call


class _Watch(TorchDispatchMode):
    """Sees the PyTorch operations of a launch; a few of them can be repeated."""

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
        elif func in _REPEATED:
            self._recorder.applied(func, args, kwargs or {}, result)
        elif not func.is_view:
            self._recorder.fail()
        return result


def _stream_of(device: torch.device) -> Callable[[], int]:
    """Asks for the current stream of a device, as Triton does."""
    from triton.runtime import driver

    active: Any = driver.active
    return functools.partial(active.get_current_stream, device.index or 0)


def _hooked() -> bool:
    """Whether a launch hook is set that must see every launch."""
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
