"""One way to define an op.

An op is one annotated function, whose body is the reference: what it computes, in PyTorch. Beside
it stand the check of its contract, the function that allocates its outputs, which is its fake too,
the kernel that serves it, and its gradients. Each of these takes what it needs of the op's
parameters and outputs by their names, as a pytest function takes fixtures. A name means the same
in every op, so checks are shared, and static parameters such as head_dim are read in one place.

    @define_op(
        returns="y",
        check=(check_tensors, check_positions),
        allocate=lambda x: x.new_empty(x.shape),
        kernel="rope forward",
        launch="x cos sin positions y",
        gradients=Gradients("x", body=_gradients, takes="dy"),
    )
    def rope_forward(x: Tensor, cos: Tensor, sin: Tensor, ...) -> Tensor:
        return reference.rope(x, cos, sin, positions)

The first call with given shapes, strides and dtypes is checked and looks up its kernel. The second
is recorded, and later ones repeat the recording: on the host they only allocate and launch. An op
that calls other ops is recorded as a whole.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from nsagen.core.compiler_cache import cache_error
from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.workload import Param, parameter_names
from nsagen.ops._calls import (
    Args,
    KnownCalls,
    TensorGuards,
    all_none,
    functional,
    is_plain,
    picker,
    profiled,
    transformed,
    unobserved,
)
from nsagen.ops._checks import values_are_read
from nsagen.ops._launch import find_kernel, on_kernels
from nsagen.ops._namespace import NAMESPACE
from nsagen.ops._sizes import reader, tokens_of
from nsagen.runtime.recorder import Recorder
from nsagen.runtime.replay import Launch, Meta, Program, allocator, meta_of

P = ParamSpec("P")
R = TypeVar("R")

Outputs = Tensor | tuple[Tensor, ...]
"""A single tensor isn't in a tuple."""

_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def define_op(
    *,
    returns: str,
    allocate: Callable[..., Outputs | None],
    check: Callable[..., object] | Sequence[Callable[..., object]] = (),
    kernel: str | Callable[..., Launch | None] = "",
    sizes: Callable[..., Mapping[str, Param]] | None = None,
    context: Callable[..., int] | None = None,
    launch: str = "",
    prepare: Mapping[str, Callable[..., Tensor | None]] | None = None,
    scratch: Mapping[str, Callable[..., Tensor]] | None = None,
    mutates: str = "",
    gradients: Any = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as the custom op nsagen::<its name>, without leading underscores; in an
    exported package the namespace is another.

    The functions passed here take parameters and outputs of the op by name, or all of them as
    attributes of a single parameter `call`. The strings list names, separated by blanks.

    Args:
        returns: the outputs, in order.
        allocate: makes the outputs, uninitialized and contiguous; it is the op's fake too. Returns
            None for an op that only writes to parameters.
        check: raises the errors of the op's contract; several are called in order. They may take
            the op's name for its errors as `op`.
        kernel: op and pass of the workload that serves a call; or a function that gives the
            `launch`, or None where the reference has to serve. Without a kernel the function calls
            other ops, and PyTorch only through `apply`. Its launches, and those of its gradients,
            are repeated as a whole. If it has no `gradients` either, those ops are called
            individually on the reference, where gradients are wanted, in exported graphs, and under
            a mode, a transform or a profiler.
        sizes: static parameters of the workload, besides those that `_sizes.reader` finds.
        context: for decoding, the tokens that a cache slot holds at most, where that is not the
            length of `k_cache`.
        launch: arguments of the kernel's `launch`, in order. The rows of the first are the call's
            tokens; where it has none, nothing is launched and the outputs are zeros. Names with a
            ? are at the end, and omitted where they and all after them are None.
        prepare: by name, what replaces an argument of `launch`.
        scratch: by name, tensors for `launch` that are not returned.
        mutates: parameters that are written to.
        gradients: `Gradients`, if there are any. An output whose gradient they do not take is not
            differentiable, and a parameter that is None has no gradient.
    """

    def define(function: Callable[P, R]) -> Callable[P, R]:
        op = Op(function, returns.split(), check, allocate, scratch or {})
        op.kernel = _Kernel(op, kernel, sizes, context) if kernel else None
        values = (*op.values, *op.scratch)
        launched = _LaunchArguments(values, launch.split(), prepare or {})
        other = None if gradients is None else gradients.define(op, kernel, sizes)
        backward = None if other is None else _Backward(op, other)
        call = _define(op, launched, tuple(mutates.split()), backward)
        vars(call)["backward"] = other
        return call

    return define


def _define(
    op: Op,
    launched: _LaunchArguments,
    mutates: tuple[str, ...],
    backward: _Backward | None,
) -> Callable[..., Any]:
    calls = _Calls(op.is_tensor, functools.partial(op.computer, launched), op.check)
    dispatched: Any = _registered(op, calls, mutates)
    function, defaults = op.function, op.defaults
    in_parts = op.kernel is None and backward is None and not mutates
    node: Any = None
    known_node: Any = None
    if backward is not None:
        node = backward.node(
            op.name, lambda known, args: dispatched(*args) if profiled() else calls.run(args, known)
        )
        base: Any = super(torch.autograd.Function, node)
        # It does not look for wrappers that outlived a transform: guards know none.
        known_node = node.apply if TensorGuards is None else base.apply
    if not mutates:
        _register_autograd(op, dispatched, calls, backward)
    in_transform: Any = _functional(op, lambda *args: call(*args), backward)

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if named:
            args = op.bound(args, named)
        compiling = torch.compiler.is_compiling()
        if not compiling and forward_ad._current_level >= 0:
            _refuse_tangents(op.name, args)
        if compiling or transformed() or not on_kernels(args[0]):
            args = args if compiling else op.exact(args)
            if in_parts and (torch.compiler.is_exporting() or not compiling or _trains(args)):
                return function(*args)
            if not mutates and not compiling and functional():
                return in_transform.apply(*args, *defaults[len(args) :])
            return dispatched(*args)
        full = args + defaults[len(args) :]
        known = calls.known.find(full)
        full = op.exact(full) if known is None else full
        if known is None and not _is_direct(calls.known.tensors(full)):
            return dispatched(*args)
        wanted = calls.requires_grad(full) if known is None else known.requires_grad
        if wanted and torch.is_grad_enabled():
            if in_parts:
                return function(*full)
            if node is None:
                return dispatched(*args)
            return (node.apply if known is None else known_node)(known, *full)
        if profiled():
            return function(*full) if in_parts else dispatched(*args)
        return calls.run(full, known)

    vars(call).update(op=op, calls=calls)
    return call


def _functional(
    op: Op, call: Callable[..., Any], backward: _Backward | None
) -> type[torch.autograd.Function]:
    """The op for the transforms of torch.func, which see through no other kind of node."""

    def refuse_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise UnsupportedWorkloadError(
            f"{op.name}: a call takes packed sequences; got a batch of calls (torch.func.vmap, "
            "jacrev); pack the sequences into one call with cu_seqlens, or call in a loop"
        )

    def refuse_jvp(ctx: Any, *tangents: Any) -> Any:
        raise _forward_mode(op.name)

    no_formula = staticmethod(functools.partial(_refuse, op.name))
    parts = {
        "forward": staticmethod(call),
        "setup_context": staticmethod(backward.setup_context if backward else _no_context),
        "backward": staticmethod(backward.run) if backward else no_formula,
        "vmap": staticmethod(refuse_vmap),
        "jvp": staticmethod(refuse_jvp),
    }
    return type(f"In_{NAMESPACE}_{op.name}", (torch.autograd.Function,), parts)


def _no_context(ctx: Any, inputs: Args, output: Any) -> None:
    pass


def _refuse_tangents(op: str, args: Args) -> None:
    """PyTorch drops the tangents of an op that has only a backward pass."""
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise _forward_mode(op)


def _forward_mode(op: str) -> UnsupportedWorkloadError:
    return UnsupportedWorkloadError(
        f"{op}: has gradients by the backward pass only; got a tangent of forward-mode "
        "derivatives (torch.func.jvp, jacfwd, dual tensors); use vjp or backward(), or "
        "nsagen.ops.reference, which is plain PyTorch"
    )


def _trains(args: Args) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _registered(op: Op, calls: _Calls, mutates: tuple[str, ...]) -> Callable[..., Any]:
    """The op that PyTorch's dispatcher knows. The dispatcher drops default arguments at the end."""
    name, defaults, allocate = f"{NAMESPACE}::{op.name}", op.defaults, op.allocate

    def from_dispatcher(*args: Any) -> Any:
        args += defaults[len(args) :]
        return calls.run(args) if on_kernels(args[0]) else op.on_reference(args)

    schema = torch.library.infer_schema(op.function, mutates_args=mutates)
    torch.library.define(name, schema)
    torch.library.impl(name, ("cpu", "cuda"), from_dispatcher)
    torch.library.register_fake(name, lambda *args: allocate(args + defaults[len(args) :]))
    return getattr(getattr(torch.ops, NAMESPACE), op.name).default


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _register_autograd(op: Op, dispatched: Any, calls: _Calls, backward: _Backward | None) -> None:
    """Like `torch.library.register_autograd`, but calls without gradients run directly.

    PyTorch would dispatch them a second time, from Python, and compiled code calls ops through the
    dispatcher.
    """
    info = Info(functools.partial(_refuse, op.name), None)
    if backward is not None:
        info = Info(backward.run, backward.setup_context)
    generic = make_autograd_impl(dispatched, info)
    defaults, in_parts = op.defaults, op.kernel is None and backward is None

    def autograd(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op.name, args)
        if in_parts and _trains(args):
            return op.function(*args)
        if torch.is_grad_enabled() or transformed() or not on_kernels(args[0]):
            return generic(keys, *args)
        if any(keys.has(key) for key in _UNUSUAL):
            return generic(keys, *args)
        return calls.run(args + defaults[len(args) :])

    _LIBRARY.impl(op.name, autograd, "Autograd", with_keyset=True)


_UNUSUAL = [getattr(torch._C.DispatchKey, name) for name in ("Python", "Negative", "Conjugate")]
"""Dispatch keys of tensors whose calls PyTorch has to handle first."""


def _is_direct(tensors: list[Tensor]) -> bool:
    """Whether a call on these tensors may bypass the dispatcher: no subclass has to see it."""
    return is_plain(tensors) and tensors[0].device.type in ("cuda", "cpu")


def _refuse(op: str, ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        f"{op} has no autograd formula, or no second derivative; call it under "
        "torch.no_grad(), or use nsagen.ops.reference, which is plain PyTorch"
    )


def by_name(function: Callable[..., Any], names: Sequence[str]) -> Callable[[Args], Any]:
    """`function` on a tuple of values with these names: it gets those that it has parameters for,
    or all of them as attributes of its parameter `call`. Others of its parameters have defaults."""
    wanted = inspect.signature(function).parameters
    if tuple(wanted) == ("call",):
        return lambda values: function(SimpleNamespace(**dict(zip(names, values, strict=True))))
    others = {name: p.default for name, p in wanted.items() if name not in names}
    if inspect.Parameter.empty in others.values():
        raise TypeError(f"{function}: takes {[*others]}; there are {[*names]}")
    every, defaults = (*names, *others), tuple(others.values())
    pick = picker([every.index(name) for name in wanted])
    return lambda values: function(*pick((*values, *defaults)))


class Op:
    """An op's parts, on arguments by position: names are resolved once."""

    def __init__(
        self,
        function: Callable[..., Any],
        returns: Sequence[str],
        check: Callable[..., object] | Sequence[Callable[..., object]],
        allocate: Callable[..., Outputs | None],
        scratch: Mapping[str, Callable[..., Tensor]],
    ) -> None:
        parameters = inspect.signature(function).parameters
        self.function, self.name = function, function.__name__.lstrip("_")
        self.names, self.returns = tuple(parameters), tuple(returns)
        self.values = (*self.names, *self.returns)
        self.defaults = tuple(p.default for p in parameters.values())
        self.hints = get_type_hints(function)
        self.is_tensor = tuple(takes_tensor(self.hints[name]) for name in self.names)
        self._whole = [i for i, name in enumerate(self.names) if self.hints[name] is int]
        self.where = self.name.removesuffix("_forward").replace("_decode", " decode")
        checks = [check] if callable(check) else check
        self._checks = [by_name(check, (*self.names, "op")) for check in checks]
        self.allocate = by_name(allocate, self.names)
        self.scratch = {name: by_name(make, self.names) for name, make in scratch.items()}
        self.kernel: _Kernel | None = None

    def exact(self, args: Args) -> Args:
        """The arguments, with Python's own whole numbers where the op takes such.

        Raises:
            InvalidInputError: one isn't a whole number, or exceeds `MOST` or `MOST_OF`.
        """
        found = list(args)
        for place in self._whole:
            if place < len(args) and type(args[place]) is not torch.SymInt:
                found[place] = _whole_number(self.where, self.names[place], args[place])
        return tuple(found)

    def check(self, args: Args) -> None:
        """Raise the errors of the op's contract."""
        for check in self._checks:
            check((*args, self.where))

    def on_reference(self, args: Args) -> Any:
        self.check(args)
        return self.function(*args)

    def computer(self, launched: _LaunchArguments, args: Args) -> Callable[[Args], Any]:
        """A function that computes a call on kernels, and all that look like it."""
        if self.kernel is None:
            return lambda args: self.function(*args)
        found = self.allocate(args)
        returned = (found,) if isinstance(found, Tensor) else found or ()
        outputs = (*returned, *(make(args) for make in self.scratch.values()))
        main = launched(args, outputs)[0]
        launch = self.kernel.find(args, main) if main.shape[0] else None
        if main.shape[0] and launch is None:
            return lambda args: self.function(*args)
        return _KernelCall(
            launch=launch,
            outputs=tuple(map(meta_of, outputs)),
            launched=launched,
            device=main.device,
            returns=len(returned),
        ).compute

    def bound(self, args: Args, named: dict[str, Any]) -> Args:
        """All arguments by position."""
        rest = zip(self.names[len(args) :], self.defaults[len(args) :], strict=True)
        args += tuple([named.pop(name, default) for name, default in rest])
        if named or any(arg is inspect.Parameter.empty for arg in args):
            takes = f"{self.name}() takes {', '.join(self.names)}"
            raise TypeError(f"{takes}; got too few" if not named else f"{takes}; got {named}")
        return args


MOST = 1 << 30
"""The largest size. Kernels add sizes to a token's position in 32 bits."""

MOST_OF = {"block_size": 4096, "kernel_size": 16384, "kernel_stride": 16384}
"""The largest of sizes that kernels loop over, however short a sequence is: the limits of a spec,
where `lse_windows` multiplies the window by up to four."""


def _whole_number(op: str, name: str, value: Any) -> int:
    most = MOST_OF.get(name, MOST)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or abs(number) > most:
        remedy = "pass an int" if number is None else "pass less"
        rule = f"{name} must be a whole number of at most {most}"
        raise InvalidInputError(f"{op}: {rule}; got {value!r}; {remedy}")
    return number


class _Kernel:
    """Which kernel serves a call; see `define_op`."""

    def __init__(
        self,
        op: Op,
        kernel: str | Callable[..., Launch | None],
        sizes: Callable[..., Mapping[str, Param]] | None,
        context: Callable[..., int] | None,
    ) -> None:
        self._launch = None if isinstance(kernel, str) else by_name(kernel, op.names)
        self._workload = kernel.split() if isinstance(kernel, str) else ["", ""]
        known = parameter_names(*self._workload) if isinstance(kernel, str) else ()
        own = by_name(sizes or (lambda: {}), op.names)
        read = {name: reader(name, op.names) for name in known}
        self._sizes = lambda args: {n: f(args) for n, f in read.items() if f} | own(args)
        without = tokens_of if "k_cache" in op.names else lambda: None
        self._context = by_name(context or without, op.names)
        self._dispatcher = op.names.index("dispatcher") if self._launch is None else 0

    def find(self, args: Args, main: Tensor) -> Launch | None:
        """The `launch` of a call's kernel, if there is one; main is the first of its arguments."""
        if self._launch is not None:
            return self._launch(args)
        (op, pass_), params = self._workload, self._sizes(args)
        return find_kernel(args[self._dispatcher], op, pass_, params, main, self._context(args))


def takes_tensor(hint: object) -> bool:
    """Whether a parameter is annotated as a tensor, or as one or None."""
    return hint is Tensor or Tensor in get_args(hint)


_CONSTANTS = {"None": None, "True": True, "False": False}
"""What a `launch` may take in addition to an op's values."""


class _LaunchArguments:
    """The arguments of a kernel's `launch`, from an op's arguments, outputs and scratch."""

    def __init__(
        self,
        values: tuple[str, ...],
        names: Sequence[str],
        prepare: Mapping[str, Callable[..., Tensor | None]],
    ) -> None:
        values += tuple(_CONSTANTS)
        self._pick = picker([values.index(name.removesuffix("?")) for name in names])
        self._least = sum(not name.endswith("?") for name in names)
        self._prepare = [(values.index(n), by_name(f, values)) for n, f in prepare.items()]

    def __call__(self, args: Args, outputs: Sequence[Tensor]) -> Args:
        values = (*args, *outputs, *_CONSTANTS.values())
        for place, stand_in in self._prepare:
            values = (*values[:place], stand_in(values), *values[place + 1 :])
        args = self._pick(values)
        end = len(args)
        while end > self._least and args[end - 1] is None:
            end -= 1
        return args[:end]


class _Calls:
    """The calls of an op on kernels. What cannot be repeated is computed every time.

    Args:
        is_tensor: which arguments are tensors or None.
        prepare: from the arguments of a call, what computes it and those that look like it.
        check: raises the errors of the contract.
    """

    def __init__(
        self,
        is_tensor: Sequence[bool],
        prepare: Callable[[Args], Callable[[Args], Any]],
        check: Callable[[Args], None],
    ) -> None:
        self.known: KnownCalls[_Known] = KnownCalls(is_tensor)
        self._prepare, self._check = prepare, check

    def run(self, args: Any, known: _Known | None = None) -> Any:
        """Compute a call; `known` is what look-up found, if it came before.

        Arguments in a list are this call's own: tensors are free after their last use.
        """
        known = self.known.find(args) if known is None else known
        if known is None:
            return self._learned(args)
        if values_are_read(args[0]):
            self._check(args)
            return known.compute(args)
        return known.run(args)

    def requires_grad(self, args: Args) -> bool:
        return any(tensor.requires_grad for tensor in self.known.tensors(args))

    def _learned(self, args: Args) -> Any:
        self._check(args)
        compute = self._prepare(args)
        if is_plain(self.known.tensors(args)):
            known = _Known(compute, self.known, self.requires_grad(args), replays(args[0]))
            self.known.learn(args, known)
        return compute(args)


class _Known:
    """What is known of calls that look alike.

    Attributes:
        compute: computes one without checks and look-up.
        requires_grad: whether any of its tensors does.
    """

    def __init__(
        self,
        compute: Callable[[Args], Any],
        calls: KnownCalls[_Known],
        requires_grad: bool,
        repeats: bool,
    ) -> None:
        self.compute, self.requires_grad = compute, requires_grad
        self._calls, self._repeats = calls, repeats
        self._recorded = False
        self._program: Program | None = None
        self._shape: Callable[[list[Tensor]], Any] = tuple

    def run(self, args: Any) -> Any:
        # Another recording includes this call, or a profiler names ops.
        if not self._repeats or _recording.recorder is not None or profiled():
            return self.compute(args)
        if not self._recorded:
            return self._record(args)
        if self._program is not None:
            if elsewhere(self._program.device):
                with torch.cuda.device(self._program.device):
                    return self.run(args)
            release = getattr(args, "clear", None)  # of a list, which is this call's own
            outputs = self._program.run(self._calls.tensors(args), release)
            if outputs is not None:
                return self._shape(outputs)
        return self.compute(args)

    def _record(self, args: Args) -> Any:
        self._recorded = True
        _recording.recorder = recorder = Recorder(self._calls.tensors(args))
        try:
            result = self.compute(args)
        finally:
            _recording.recorder = None
        outputs: Iterable[Tensor] = ()
        if result is None:
            self._shape = lambda outputs: None
        elif isinstance(result, Tensor):
            self._shape, outputs = (lambda outputs: outputs[0]), (result,)
        else:
            outputs = result
        self._program = recorder.program(outputs)
        return result


@dataclass(frozen=True, slots=True)
class _KernelCall:
    """How a kernel computes calls that look alike.

    Attributes:
        launch: of the kernel; None if there are no rows, and the outputs are zeros.
        outputs: shapes, strides and dtypes.
        launched: the arguments of `launch`.
        returns: how many of the outputs are returned.
    """

    launch: Launch | None
    outputs: tuple[Meta, ...]
    launched: _LaunchArguments
    device: torch.device
    returns: int

    def compute(self, args: Args) -> Any:
        if elsewhere(self.device):
            with torch.cuda.device(self.device):
                return self.compute(args)
        empty, recorder = allocator(self.device), _recording.recorder
        outputs = [empty(*meta) for meta in self.outputs]
        if recorder is not None:
            for output in outputs:
                recorder.allocated(output)
        if self.launch is None:
            for output in outputs:
                apply(Tensor.zero_, output)
        else:
            try:
                if recorder is None:
                    self.launch(*self.launched(args, outputs))
                else:
                    recorder.run(self.launch, self.launched(args, outputs))
            except OSError as error:  # Triton compiles at the first launch
                if (told := cache_error(error)) is None:
                    raise
                raise told from error
        if self.returns == 1:
            return outputs[0]
        return tuple(outputs[: self.returns]) if self.returns else None


def replays(x: Tensor) -> bool:
    """Whether launches on x's device are replayed: Triton's interpreter launches nothing."""
    return x.is_cuda and not torch.version.hip


def elsewhere(device: torch.device) -> bool:
    """Whether a device must be made current before kernels run on it."""
    return device.type == "cuda" and _current_device() != device.index


class _Recording(threading.local):
    """The recorder of this thread's current call, if any."""

    recorder: Recorder | None = None


_recording = _Recording()


@contextmanager
def recording_launches(recorder: Any) -> Iterator[None]:
    """Give what this thread's calls allocate and launch to a recorder, which may launch it."""
    before, _recording.recorder = _recording.recorder, recorder
    try:
        yield
    finally:
        _recording.recorder = before


def apply(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call PyTorch between ops that are recorded as a whole; the recording includes it."""
    result = function(*args)
    if _recording.recorder is not None:
        _recording.recorder.applied(function, args, {}, result)
    return result


class _Backward:
    """An op's backward pass by names.

    Args:
        other: the op that computes it, as `Gradients` makes it.
    """

    def __init__(self, op: Op, other: Callable[..., Any]) -> None:
        first = vars(other)["first"]
        wanted = {*vars(other)["op"].names, *(() if first is None else vars(first)["op"].names)}
        is_tensor = (*op.is_tensor, *(True for _ in op.returns))
        of_value = dict(zip(op.values, is_tensor, strict=True))
        grads = [f"d{name}" for name in op.returns]
        kept = [name for name, tensor in of_value.items() if name in wanted and tensor]
        statics = [name for name, tensor in of_value.items() if name in wanted and not tensor]
        self._inputs = op.names
        self._kept = picker([op.values.index(name) for name in kept])
        self._statics = picker([op.values.index(name) for name in statics])
        self._taken = picker([i for i, name in enumerate(grads) if name in wanted])
        self._without = picker([i for i, name in enumerate(grads) if name not in wanted])
        taken = [name for name in grads if name in wanted]
        names = (*taken, *kept, *statics)
        tensors = [True for _ in (*taken, *kept)] + [False for _ in statics]
        self._calls = _Calls(tensors, lambda values: self._by_kernels, lambda values: None)
        self._first = None if first is None else _Part(first, names)
        if self._first is not None:
            names = (*names, *vars(first)["op"].returns)
        self._second = _Part(other, names)
        also = vars(other)["op"].names
        self._only_first = [i for i, n in enumerate((*taken, *kept)) if n not in also]
        self._of = [name.removeprefix("d") for name in vars(other)["op"].returns]
        self._placed = functools.lru_cache(self._placing)

    def setup_context(self, ctx: Any, inputs: Args, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        without = self._without(outputs)
        if without:
            ctx.mark_non_differentiable(*without)
        ctx.set_materialize_grads(False)
        values = (*inputs, *outputs)
        ctx.save_for_backward(*self._kept(values))
        ctx.statics = self._statics(values)

    def run(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return self._gradients(ctx, grads, ctx.needs_input_grad)

    def _gradients(
        self, ctx: Any, grads: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        taken = self._taken(grads)
        if all_none(taken):  # nothing depends on any of them
            return (None,) * len(needed)
        values = [*taken, *ctx.saved_tensors, *ctx.statics]
        if on_kernels(taken[0]) and unobserved() and not torch.is_grad_enabled():
            ctx.maybe_clear_saved_tensors()  # unless the graph is kept
            found = self._calls.run(values)
        else:
            if self._first is not None:
                values += self._first(values)
            found = self._second(values)
        return self._placed(needed)((*found, None))

    def _by_kernels(self, values: Any) -> tuple[Tensor, ...]:
        """The gradients of values in a list; what only the first part takes is freed before the
        second one."""
        if self._first is not None:
            values += self._first.direct(values)
            for place in self._only_first:
                if _recording.recorder is not None and values[place] is not None:
                    _recording.recorder.let_go(values[place])
                values[place] = None
        return self._second.direct(values)

    def _placing(self, needed: tuple[bool, ...]) -> Callable[[Args], Args]:
        """Picks the gradients of inputs: None, which comes last, where none is needed."""
        # The dispatcher drops defaults at the end: there may be fewer inputs than names.
        inputs = zip(self._inputs, needed, strict=False)
        return picker([self._of.index(n) if need and n in self._of else -1 for n, need in inputs])

    def node(self, name: str, forward: Callable[[Any, Args], Any]) -> Any:
        """A node of autograd's graph without the dispatcher.

        Its first input is passed to `forward` in front of the op's own.
        """

        def run_forward(ctx: Any, known: Any, *args: Any) -> Any:
            output = forward(known, args)
            self.setup_context(ctx, args, output)
            return output

        def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return None, *self._gradients(ctx, grads, ctx.needs_input_grad[1:])

        once = once_differentiable(run)

        def run_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            # Without a graph of the gradients there is no second derivative to refuse.
            return (once if torch.is_grad_enabled() else run)(ctx, *grads)

        parts = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
        return type(f"BackwardOf_{NAMESPACE}_{name}", (torch.autograd.Function,), parts)


class _Part:
    """An op that a backward pass calls on values with these names; it has defaults for others."""

    def __init__(self, call: Callable[..., Any], names: Sequence[str]) -> None:
        op: Op = vars(call)["op"]
        places = [names.index(n) if n in names else len(names) + i for i, n in enumerate(op.names)]
        self._pick, self._defaults = picker(places), op.defaults
        self._call, self._run, self._one = call, vars(call)["calls"].run, len(op.returns) == 1

    def __call__(self, values: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the op returns, as a tuple."""
        found = self._call(*self._pick((*values, *self._defaults)))
        return (found,) if self._one else found

    def direct(self, values: Sequence[Any]) -> tuple[Tensor, ...]:
        """The same on kernels, where nothing has to observe the call."""
        found = self._run(self._pick((*values, *self._defaults)))
        return (found,) if self._one else found
