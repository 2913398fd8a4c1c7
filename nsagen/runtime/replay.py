"""Repeats kernel launches at a fraction of their cost on the host.

A `launch` computes grids, strides and workspaces, and Triton then examines every argument again
to find the compiled kernel: tens of microseconds a kernel. For calls that differ only in the
addresses of their tensors, all of this gives the same result. So one such call is recorded while
it runs, and the others pass the new addresses to the kernels that it launched.

A `Program` is such a recording: allocations, launches and a few PyTorch operations in order.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        device: where the tensors are.
        aligned: the inputs whose addresses must be multiples of 16, as the recorded ones were.
    """

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    device: torch.device
    aligned: tuple[int, ...]

    @functools.cached_property
    def _run(self) -> Callable[..., list[Tensor] | None]:
        return functools.partial(_repeat, *_compiled(self))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Launch the kernels on a call's tensors; returns the outputs, or None if that is
        impossible: addresses with another alignment, or a profiler's hooks in Triton."""
        return self._run(tensors)


@dataclass(slots=True)
class _Base:
    """Stands in for a tensor in a descriptor."""

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


_Step = Callable[[list[Any], list[Any]], None]
"""On flat lists: values (the stream, addresses, constants, maps of bulk copies) and tensors."""


def _compiled(program: Program) -> tuple[Any, ...]:
    """The arguments of `_repeat` before the tensors.

    Its `values` are the stream, the inputs' addresses, the constants and then, as steps make them,
    the slots' addresses (one for each offset in use) and maps of bulk copies.
    """
    offsets: dict[int, list[int]] = {}
    for step in program.steps:
        for place in map(place_of, step.args) if isinstance(step, Run) else ():
            if place is not None and place.offset not in offsets.setdefault(place.slot, []):
                offsets[place.slot].append(place.offset)
    inputs = range(program.inputs)
    moved = [Place(slot, n) for slot in inputs for n in offsets.get(slot, ()) if n]
    index = {place: n for n, place in enumerate([*map(Place, inputs), *moved], start=1)}
    aligned = [index[Place(slot)] for slot in program.aligned]
    constants: list[Any] = []
    first_constant = 1 + len(index)

    def constant(value: Any) -> int:
        constants.append(value)
        return first_constant + len(constants) - 1

    expanded = [_expanded(s, constant) if isinstance(s, Run) else None for s in program.steps]
    count = first_constant + len(constants)
    empty, steps, slot = allocator(program.device), list[_Step](), program.inputs
    dead = _last_uses(program)
    for step, launch, unused in zip(program.steps, expanded, dead, strict=True):
        used: list[int] | None = None
        if makes_slot(step):
            used = offsets.get(slot, [])
            index |= {Place(slot, offset): count + n for n, offset in enumerate(used)}
            count += len(used)
            slot += 1
        if isinstance(step, Allocate):
            steps.append(functools.partial(_allocate, empty, step.meta, tuple(used or ())))
        elif isinstance(step, Apply):
            steps.append(functools.partial(_apply, step, used))
        elif launch is not None:
            picked = [index[arg] if isinstance(arg, Place) else arg for arg in launch.args]
            makes = []
            for argument, base, make in launch.descriptors:
                makes.append((index[base], make))
                picked[argument] = count
                count += 1
            pick = operator.itemgetter(*picked)
            if makes:
                steps.append(functools.partial(_describe, tuple(makes)))
            steps.append(functools.partial(_launch, launch.function, pick))
        if unused:
            steps.append(functools.partial(_free, unused))
    return (
        tuple(steps),
        tuple(aligned),
        tuple((index[Place(place.slot)], place.offset) for place in moved),
        tuple(constants),
        program.outputs,
        _stream_of(program.device),
        _hooks(),
    )


@dataclass(frozen=True)
class _Expanded:
    """A launch by its places and the indices of its constants.

    Attributes:
        descriptors: of bulk copies: the argument that each is, the place of its tensor, and what
            makes it from the address.
    """

    function: Callable[..., None]
    args: list[Any]
    descriptors: list[tuple[int, Place, Callable[[int], Any]]]


def _expanded(step: Run, constant: Callable[[Any], int]) -> _Expanded:
    launch, fixed, metas = _direct_launcher(step.compiled) or _launcher(step.compiled)
    args: list[Any] = [*map(constant, step.grid), _STREAM, *map(constant, fixed)]
    descriptors: list[tuple[int, Place, Callable[[int], Any]]] = []
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
    return _Expanded(launch, args, descriptors)


_STREAM = 0
"""Its index in `values`."""

Launcher = tuple[Callable[..., None], tuple[Any, ...], list[dict[str, Any]] | None]
"""What launches a kernel, its arguments between the stream and the kernel's own, and what is known
of the kernel's descriptors where it takes them as maps."""


def _launcher(compiled: Any) -> Launcher:
    """Triton's own launcher of a kernel, without metadata and hooks."""
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), None


def _direct_launcher(compiled: Any) -> Launcher | None:
    """What Triton 3.6's launcher of a kernel finally calls.

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
    fixed = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None)
    return launch, (*fixed, compiled.packed_metadata, None, None, None), metas


_MAX_MAPS = 64


def _map_maker(fields: Mapping[str, Any], meta: dict[str, Any]) -> Callable[[int], Any]:
    """Makes the map that a GPU reads for a descriptor from an address; caches the last ones."""
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


def makes_slot(step: Step) -> bool:
    return isinstance(step, Allocate) or (isinstance(step, Apply) and step.makes_slot)


def _last_uses(program: Program) -> list[tuple[int, ...]]:
    """For each step, the slots that it is the last one to use, of those that are not returned."""
    last: dict[int, int] = {}
    slot = program.inputs
    for position, step in enumerate(program.steps):
        if makes_slot(step):
            last[slot] = position
            slot += 1
        for place in () if isinstance(step, Allocate) else map(place_of, step.args):
            if place is not None and place.slot in last:
                last[place.slot] = position
    dead: list[list[int]] = [[] for _ in program.steps]
    for slot, position in last.items():
        if slot not in program.outputs:
            dead[position].append(slot)
    return [tuple(slots) for slots in dead]


def _repeat(
    steps: tuple[_Step, ...],
    aligned: tuple[int, ...],
    moved: tuple[tuple[int, int], ...],
    constants: tuple[Any, ...],
    outputs: tuple[int, ...],
    stream_of: Callable[[], int],
    hooked: Callable[[], bool],
    tensors: Sequence[Tensor],
) -> list[Tensor] | None:
    values: list[Any] = [stream_of(), *map(_data_ptr, tensors)]
    bits = 0
    for place in aligned:
        bits |= values[place]
    if bits % _ALIGNMENT or hooked():
        return None
    for address, offset in moved:
        values.append(values[address] + offset)
    values += constants
    slots: list[Any] = [*tensors]
    for step in steps:
        step(values, slots)
    return [slots[slot] for slot in outputs]


def _allocate(
    empty: Empty, meta: Meta, offsets: tuple[int, ...], values: list[Any], slots: list[Any]
) -> None:
    tensor = empty(*meta)
    slots.append(tensor)
    if offsets:
        address = _data_ptr(tensor)
        for offset in offsets:
            values.append(address + offset)


def _apply(step: Apply, offsets: list[int] | None, values: list[Any], slots: list[Any]) -> None:
    args = [slots[arg.slot] if isinstance(arg, Place) else arg for arg in step.args]
    tensor = step.function(*args, **step.named)
    if offsets is not None:
        slots.append(tensor)
        address = _data_ptr(tensor)
        values.extend([address + offset for offset in offsets])


def _free(dead: tuple[int, ...], values: list[Any], slots: list[Any]) -> None:
    for slot in dead:
        slots[slot] = None


def _describe(
    makes: tuple[tuple[int, Callable[[int], Any]], ...], values: list[Any], slots: list[Any]
) -> None:
    for base, make in makes:
        values.append(make(values[base]))


def _launch(
    launch: Callable[..., None],
    pick: Callable[[list[Any]], tuple[Any, ...]],
    values: list[Any],
    slots: list[Any],
) -> None:
    launch(*pick(values))


_SMALL = 2 << 20
"""Bytes. Larger workspaces are freed after their last use; smaller ones share an allocation."""
_APART = 512
"""Bytes between starts of tensors, as in PyTorch's allocator."""


def share_workspaces(program: Program) -> Program:
    """The program with one allocation for all small tensors that only its kernels use."""
    tensors = {*program.outputs}
    for step in program.steps:
        if isinstance(step, Apply):
            tensors |= {place.slot for place in map(place_of, step.args) if place is not None}
    shared = program.inputs
    places = {slot: Place(slot) for slot in range(shared)}
    slot, made, size, steps = shared, shared + 1, 0, list[Step]()
    for step in filter(makes_slot, program.steps):
        places[slot] = Place(made)
        if isinstance(step, Allocate) and slot not in tensors and _bytes(step.meta) <= _SMALL:
            places[slot] = Place(shared, size)
            size += -(-_bytes(step.meta) // _APART) * _APART
        else:
            made += 1
        slot += 1
    if size == 0:
        return program

    def moved(arg: Any) -> Any:
        if isinstance(arg, Descriptor):
            return Descriptor(arg.kind, arg.fields, moved(arg.base))
        if not isinstance(arg, Place):
            return arg
        return Place(places[arg.slot].slot, places[arg.slot].offset + arg.offset)

    slot = shared
    for step in program.steps:
        if not isinstance(step, Allocate):
            steps.append(replace(step, args=tuple(map(moved, step.args))))
        elif places[slot].slot != shared:
            steps.append(step)
        slot += makes_slot(step)
    outputs = tuple(places[slot].slot for slot in program.outputs)
    steps.insert(0, Allocate(((size,), (1,), torch.uint8)))
    return replace(program, steps=tuple(steps), outputs=outputs)


def _bytes(meta: Meta) -> int:
    """The bytes from a tensor's first to its last element."""
    shape, strides, dtype = meta
    if 0 in shape:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return (last + 1) * dtype.itemsize


class Recorder:
    """Collects the steps of a call on some tensors as it runs.

    The caller ensures this of the calls that repeat them: shapes, strides, dtypes, devices and all
    other arguments agree with the recorded call's, and they run on the tensors' device.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = list(inputs)
        self._slots: list[Tensor | None] = list(inputs)  # keeps ids and addresses from being reused
        self._of_id = {id(tensor): slot for slot, tensor in enumerate(inputs)}
        self._of_storage: dict[int, int] = {}
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
        device, inputs = self._inputs[0].device, len(self._inputs)
        steps, aligned = tuple(self._steps), tuple(self._aligned)
        return share_workspaces(Program(inputs, steps, tuple(slots), device, aligned))

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
            if tensor.data_ptr() % _ALIGNMENT:
                return self.fail()
            if place.slot < len(self._inputs):
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


def place_of(arg: Any) -> Place | None:
    """Where the pointer of an argument goes, if it has one."""
    arg = arg.base if isinstance(arg, Descriptor) else arg
    return arg if isinstance(arg, Place) else None


def meta_of(tensor: Tensor) -> Meta:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


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


def _stream_of(device: torch.device) -> Callable[[], int]:
    """A function that returns the current stream of a device, as Triton does."""
    from triton.runtime import driver

    active: Any = driver.active
    return functools.partial(active.get_current_stream, device.index or 0)


def _hooks() -> Callable[[], bool]:
    """A function that tells whether a launch hook must see every launch."""
    from triton import knobs

    def hooked(runtime: Any = knobs.runtime) -> bool:
        first, last = runtime.launch_enter_hook, runtime.launch_exit_hook
        return _calls(first) or _calls(last)

    return hooked


def _calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
