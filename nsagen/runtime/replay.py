"""Repeats kernel launches at a fraction of their cost on the host.

A `launch` computes grids, strides and workspaces, and Triton then examines every argument again
to find the compiled kernel: tens of microseconds a kernel. For calls that differ only in the
addresses of their tensors, all of this gives the same result. So one such call is recorded while
it runs, and the others pass the new addresses to the kernels that it launched.

A `Program` is such a recording: allocations, launches and a few PyTorch operations in order.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Launch = Callable[..., None]
Meta = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype."""

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel for which of its pointers are multiples of this."""

_data_ptr = torch.Tensor.data_ptr
_empty_strided_cuda = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


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
    def run(self) -> Callable[..., list[Tensor] | None]:
        """Launches the kernels on a list of a call's tensors; returns the outputs, or None if that
        is impossible: addresses with another alignment, or a profiler's hooks in Triton.

        With a second argument, a function that drops other references to the tensors, it clears
        the list and calls that: inputs are free after their last use.
        """
        return _function(self)


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


def _function(program: Program) -> Callable[..., list[Tensor] | None]:
    """The program in Python, with the arguments of each launch written out.

    Constants are names in its text, so that programs of the same steps share compiled code.
    """
    constants: list[Any] = []

    def name(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return str(value)
        constants.append(value)
        return f"c{len(constants) - 1}"

    def pointer(place: Place) -> str:
        return f"p{place.slot}" + (f" + {name(place.offset)}" if place.offset else "")

    described: dict[tuple[Place, str], str] = {}

    def describe(base: Place, make: Callable[[int], Any], what: str) -> str:
        """A descriptor's name; launches share those of the same tensor that are the same."""
        if (base, what) not in described:
            described[base, what] = f"d{len(described)}"
            lines.append(f"{described[base, what]} = {name(make)}({pointer(base)})")
        return described[base, what]

    used = [place_of(arg) for s in program.steps if isinstance(s, Run) for arg in s.args]
    pointed = {place.slot for place in used if place is not None}

    def take_address(slot: int) -> list[str]:
        return [f"p{slot} = {address_of}(t{slot})"] if slot in pointed else []

    address_of, empty = name(_data_ptr), name(allocator(program.device))
    inputs = range(program.inputs)
    lines = ["".join(f"t{slot}, " for slot in inputs) + "= tensors"]
    for slot in inputs:
        lines += take_address(slot)
    bits = " | ".join(["0", *(f"p{slot}" for slot in program.aligned)])
    lines += [f"if ({bits}) % {ALIGNMENT} or {name(_hooks())}():", "    return None"]
    lines += ["if release is not None:", "    tensors.clear()", "    release()"]
    lines += [f"stream = {name(_stream_of(program.device))}()"]
    slot = program.inputs
    for step, unused in zip(program.steps, _last_uses(program), strict=True):
        if isinstance(step, Allocate):
            call = f"{empty}({', '.join(map(name, step.meta))})"
        elif isinstance(step, Apply):
            args = [f"t{arg.slot}" if isinstance(arg, Place) else name(arg) for arg in step.args]
            args += [f"{key}={name(value)}" for key, value in step.named.items()]
            call = f"{name(step.function)}({', '.join(args)})"
        else:
            call = _launch_of(step, name, pointer, describe)
        if makes_slot(step):
            lines += [f"t{slot} = {call}", *take_address(slot)]
            slot += 1
        else:
            lines.append(call)
        if unused:
            lines.append("del " + ", ".join(f"t{dead}" for dead in unused))
    lines.append(f"return [{', '.join(f't{slot}' for slot in program.outputs)}]")
    names = ", ".join(f"c{n}" for n in range(len(constants)))
    body = "".join(f"\n        {line}" for line in lines)
    text = f"def make({names}):\n    def run(tensors, release=None):{body}\n    return run\n"
    return _made(text)(*constants)


def _launch_of(
    step: Run,
    name: Callable[[Any], str],
    pointer: Callable[[Place], str],
    describe: Callable[[Place, Callable[[int], Any], str], str],
) -> str:
    """The call that launches a step's kernel."""
    launch, fixed, metas = _direct_launcher(step.compiled) or _launcher(step.compiled)
    args = [*map(name, step.grid), "stream", *map(name, fixed)]
    of_maps = iter(metas or ())
    for arg in step.args:
        if isinstance(arg, Place):
            args.append(pointer(arg))
        elif not isinstance(arg, Descriptor):
            args.append(name(arg))
        elif metas is None:
            make = functools.partial(_descriptor, arg.kind, dict(arg.fields))
            args.append(describe(arg.base, make, f"{arg.kind} {arg.fields}"))
        else:
            meta = next(of_maps)
            make = _map_maker(arg.fields, meta)
            args.append(describe(arg.base, make, f"{meta} {arg.fields}"))
            args += map(name, (*arg.fields["shape"], *arg.fields["strides"]))
    return f"{name(launch)}({', '.join(args)})"


@functools.lru_cache(maxsize=512)
def _made(text: str) -> Callable[..., Any]:
    """The function `make` of a text."""
    names: dict[str, Any] = {}
    exec(compile(text, "<a repeated call>", "exec"), names)
    return names["make"]


Launcher = tuple[Callable[..., None], tuple[Any, ...], list[dict[str, Any]] | None]
"""What launches a kernel, its arguments between the stream and the kernel's own, and what is known
of the kernel's descriptors where it takes them as maps."""


def _launcher(compiled: Any) -> Launcher:
    """Triton's own launcher of a kernel, without metadata and hooks."""
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), None


def _direct_launcher(compiled: Any) -> Launcher | None:
    """What Triton 3.6's launcher of a kernel finally calls.

    The launcher is Python: for each call it allocates scratch memory that few kernels need, and
    unpacks descriptors. None if a launcher is not as expected.
    """
    run = compiled.run
    names = ("launch", "launch_cooperative_grid", "launch_pdl", "num_ctas")
    simple = type(run).__name__ == "CudaLauncher" and all(hasattr(run, name) for name in names)
    if not simple or hasattr(run, "arg_annotations"):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    launch, metas = run.launch, []
    if isinstance(launch, types.FunctionType):  # unpacks descriptors, then launches
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
            if place is not None:
                last[place.slot] = position
    dead: list[list[int]] = [[] for _ in program.steps]
    for slot, position in last.items():
        if slot not in program.outputs:
            dead[position].append(slot)
    return [tuple(slots) for slots in dead]


_SMALL = 2 << 20
"""Bytes. Larger workspaces are freed after their last use; smaller ones share an allocation."""
_APART = 512
"""Bytes between starts of tensors, as in PyTorch's allocator."""


def share_workspaces(program: Program) -> Program:
    """The program with fewer allocations for tensors that only its kernels use.

    Small ones share one. Large ones share one where they are made and freed together.
    """
    tensors = {*program.outputs}
    for step in program.steps:
        if isinstance(step, Apply):
            tensors |= {place.slot for place in map(place_of, step.args) if place is not None}
    freed = {slot: at for at, slots in enumerate(_last_uses(program)) for slot in slots}
    groups: dict[object, list[int]] = {}
    sizes: dict[int, int] = {}
    slot, kernels = program.inputs, 0
    for step in program.steps:
        if isinstance(step, Allocate) and slot not in tensors:
            sizes[slot] = _bytes(step.meta)
            small = sizes[slot] <= _SMALL
            groups.setdefault(small or (kernels, freed.get(slot)), []).append(slot)
        kernels += not isinstance(step, Allocate)
        slot += makes_slot(step)

    steps, places = list[Step](), {slot: Place(slot) for slot in range(program.inputs)}
    made = program.inputs

    def allocate(slots: Sequence[int]) -> None:
        nonlocal made
        size = 0
        for slot in slots:
            places[slot] = Place(made, size)
            size += -(-sizes[slot] // _APART) * _APART
        steps.append(Allocate(((size,), (1,), torch.uint8)))
        made += 1

    def moved(arg: Any) -> Any:
        if isinstance(arg, Descriptor):
            return Descriptor(arg.kind, arg.fields, moved(arg.base))
        if not isinstance(arg, Place):
            return arg
        return Place(places[arg.slot].slot, places[arg.slot].offset + arg.offset)

    if any(sizes[slot] for slot in groups.get(True, ())):
        allocate(groups[True])
    shared = {slot: slots for slots in groups.values() if len(slots) > 1 for slot in slots}
    slot = program.inputs
    for step in program.steps:
        if not isinstance(step, Allocate):
            steps.append(replace(step, args=tuple(map(moved, step.args))))
        elif slot in shared and slot not in places:
            allocate(shared[slot])
        elif slot not in places:
            steps.append(step)
        if makes_slot(step):
            if slot not in places:
                places[slot] = Place(made)
                made += 1
            slot += 1
    outputs = tuple(places[slot].slot for slot in program.outputs)
    return replace(program, steps=tuple(steps), outputs=outputs)


def _bytes(meta: Meta) -> int:
    """The bytes from a tensor's first to its last element."""
    shape, strides, dtype = meta
    if 0 in shape:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return (last + 1) * dtype.itemsize


def place_of(arg: Any) -> Place | None:
    """Where the pointer of an argument goes, if it has one."""
    arg = arg.base if isinstance(arg, Descriptor) else arg
    return arg if isinstance(arg, Place) else None


def meta_of(tensor: Tensor) -> Meta:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


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
