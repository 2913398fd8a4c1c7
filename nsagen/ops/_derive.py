"""Ops whose parameters follow from another annotated function: a reference, or a forward pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import Tensor

from nsagen.ops._gradients import reference_gradients
from nsagen.ops._launch import no_backward, with_contiguous_rows
from nsagen.ops._op import Op, by_name, define_op, takes_tensor

_NONE = inspect.Parameter.empty


def op_of(
    name: str, reference: Callable[..., Any], *, omit: str = "", **how: Any
) -> Callable[..., Any]:
    """The op nsagen::<name> of a reference, with its parameters and `dispatcher: str`.

    That one follows the last scale, or comes last.

    Args:
        omit: parameters that the op does not have; the reference's defaults stand for them.
        how: as in `define_op`.
    """
    hints = get_type_hints(reference)
    returns = None if hints["return"] is type(None) else hints["return"]
    parameters = inspect.signature(reference).parameters
    names = [n for n in parameters if n not in omit.split()]
    scales = (n for n in names if n.endswith("_scale") and not takes_tensor(hints[n]))
    after = max(map(names.index, scales), default=len(names) - 1)
    names.insert(after + 1, "dispatcher")
    places = [(n, i) for i, n in enumerate(names) if n != "dispatcher"]

    def body(*args: Any) -> Any:
        return reference(**{n: args[i] for n, i in places})

    types = {n: hints.get(n, str) for n in names}
    defaults = {n: p.default for n, p in parameters.items()} | {"dispatcher": ""}
    return define_op(**how)(_declared(name, body, types, returns, defaults))


def op_like(
    name: str,
    others: Callable[..., Any] | tuple[Callable[..., Any], ...],
    body: Callable[..., Any],
    parameters: str = "",
    *,
    omit: str = "",
    texts: str = "",
    **how: Any,
) -> Callable[..., Any]:
    """An op with parameters of other ops, whose types and defaults they keep, and more tensors.

    It needs a kernel or gradients: then PyTorch's compiler calls it as a whole, whose body it could
    not trace.

    Args:
        body: takes what it needs by name, or all as attributes of `call`.
        parameters: names in order, those of the first other op by default. One with a ? is a tensor
            or None.
        omit: parameters of the other op that this one does not have.
        texts: parameters that are texts, empty by default, which no other op has.
        how: as in `define_op`.
    """
    every: list[Op] = [
        vars(one)["op"] for one in (others if isinstance(others, tuple) else (others,))
    ]
    hints, defaults = dict[str, Any](), dict[str, Any]()
    for op in reversed(every):
        hints |= op.hints
        defaults |= zip(op.names, op.defaults, strict=True)
    hints |= {"softmax_scale": float} | dict.fromkeys(texts.split(), str)
    defaults |= {"softmax_scale": _NONE} | dict.fromkeys(texts.split(), "")
    wanted = parameters.split() or [n for n in every[0].names if n not in omit.split()]
    optional = [n.removesuffix("?") for n in wanted if n.endswith("?")]
    hints |= dict.fromkeys(optional, Tensor | None)
    defaults |= dict.fromkeys(optional)
    types = {n: hints.get(n, Tensor) for n in (n.removesuffix("?") for n in wanted)}
    run = _on_tuple(by_name(body, tuple(types)))
    return define_op(**how)(_declared(name, run, types, _tensors(how["returns"]), defaults))


def called(function: Callable[..., Any], call: Any, **others: Any) -> Any:
    """The function on attributes of a call that have its parameters' names, or on others."""
    values = vars(call) | others
    names = inspect.signature(function).parameters
    return function(**{name: values[name] for name in names if name in values})


def dense(names: str) -> dict[str, Callable[..., Tensor]]:
    """What `define_op` takes as `prepare` for arguments that a kernel needs contiguous."""
    return {name: _taking(Tensor.contiguous, name) for name in names.split()}


def backward_of(op: Callable[..., Any], *, adds: bool = False) -> Callable[..., Any]:
    """The op that `Gradients` made for another one; or that which adds to gradients."""
    backward = vars(op)["backward"]
    return vars(backward)["adds"] if adds else backward


@dataclass(frozen=True)
class Gradients:
    """The backward pass of an op, as the op <name>_backward.

    Its parameters are gradients of outputs (of the first one, without a body) and the op's own
    parameters, with outputs after the tensors that come first. It returns the gradient of each
    parameter in `of`: contiguous, and empty where that is None.

    Attributes:
        of: parameters that have a gradient.
        launch: as in `define_op`, of the same kernel's backward pass; without kernels the op's
            function is differentiated.
        prepare: as in `define_op`, beside contiguous rows of gradients.
        more: optional tensors at the end of the parameters, which only kernels take.
        adds: gradients that another op, <name>_backward_add, does not return, but adds to in
            place; `launch` has True there where it has False.
        body: in place of a launch, a function of `call` on other ops.
        takes: gradients and outputs that body takes, and outputs of `first`.
        first: an op that is called before, on gradients, parameters and outputs. What only this
            one takes is free when it returns.
        omit: parameters that body does not take.
        like: by parameter, what its gradient looks like instead.
    """

    of: str
    launch: str = ""
    prepare: Mapping[str, Callable[..., Tensor | None]] = field(default_factory=dict)
    more: str = ""
    adds: str = ""
    body: Callable[..., Any] | None = None
    takes: str = ""
    first: Callable[..., Any] | None = None
    omit: str = ""
    like: Mapping[str, str] = field(default_factory=dict)

    def define(self, op: Op, kernel: str, sizes: Callable[..., Any] | None) -> Callable[..., Any]:
        """Register the backward pass of an op with this forward kernel, and its sizes."""
        of, more, adds = self.of.split(), self.more.split(), self.adds.split()
        own = [name for name in op.names if name not in self.omit.split()]
        leading = next((i for i, n in enumerate(own) if not takes_tensor(op.hints[n])), len(own))
        named = dict.fromkeys(f"{self.takes} {self.launch}".split())
        made = () if self.first is None else vars(self.first)["op"].returns
        grads = [n for n in (*(f"d{n}" for n in op.returns), *made) if n in named]
        outputs = [n for n in named if n in op.returns]
        hints = op.hints | dict.fromkeys(outputs, Tensor | None if more else Tensor)
        hints |= dict.fromkeys(more, Tensor | None)

        def parameters(*changed: str) -> dict[str, Any]:
            names = (*grads, *own[:leading], *outputs, *changed, *own[leading:], *more)
            return {n: hints.get(n, Tensor) for n in names}

        types, name = parameters(), f"{op.name.removesuffix('_forward')}_backward"
        defaults = dict(zip(op.names, op.defaults, strict=True)) | dict.fromkeys(more)
        how: dict[str, Any] = {}
        if self.body is not None:
            run = _on_tuple(by_name(self.body, tuple(types)))
        else:
            run = _differentiated(op, of, more, types)
            how = {"kernel": kernel.replace("forward", "backward"), "sizes": sizes}
            how["launch"] = self.launch
            how["prepare"] = {
                **{n: _taking(with_contiguous_rows, n) for n in grads},
                **{f"d{n}": _taking(_if_given, n, f"d{n}") for n in of if op.hints[n] != Tensor},
                **self.prepare,
            }
        how["allocate"] = self._allocator(grads[0], of)
        backward = _define(name, run, types, of, defaults, how)
        vars(backward)["first"] = self.first
        if adds:
            kept = [n for n in of if f"d{n}" not in adds]
            how |= {"mutates": self.adds, "launch": self.launch.replace("False", "True")}
            how["allocate"] = self._allocator(grads[0], kept)

            def refuse(*args: Any) -> Any:
                raise no_backward(name, args[0])

            added = _define(f"{name}_add", refuse, parameters(*adds), kept, defaults, how)
            vars(backward)["adds"] = added
        return backward

    def _allocator(self, first: str, of: list[str]) -> Callable[..., Any]:
        """Makes contiguous gradients of parameters; without elements for those that are None."""
        looks = [self.like.get(name, name) for name in of]

        def allocate(call: Any) -> Any:
            tensors = [getattr(call, name) for name in looks]
            empty = getattr(call, first).new_empty
            made = [empty(0) if x is None else x.new_empty(x.shape) for x in tensors]
            return (tuple(made) if len(made) > 1 else made[0]) if made else None

        return allocate


def _differentiated(
    op: Op, of: list[str], more: list[str], types: Mapping[str, Any]
) -> Callable[..., Any]:
    """The gradients of an op's function, from the values of a backward pass's parameters."""

    def run(*args: Any) -> Any:
        values = dict(zip(types, args, strict=True))
        if any(values[n] is not None for n in more):
            raise no_backward(op.name, args[0])
        inputs = {n: values[n] for n in of if values[n] is not None}

        def forward(*leaves: Tensor) -> Tensor:
            taken = values | dict(zip(inputs, leaves, strict=True))
            made = op.function(*(taken[n] for n in op.names))
            return made[0] if len(op.returns) > 1 else made

        found = reference_gradients(forward, tuple(inputs.values()), args[0])
        of_inputs = dict(zip(inputs, found, strict=True))
        every = [of_inputs[n] if n in of_inputs else args[0].new_empty(0) for n in of]
        return tuple(every) if len(every) > 1 else every[0]

    return run


def _define(
    name: str,
    body: Callable[..., Any],
    types: Mapping[str, Any],
    of: list[str],
    defaults: Mapping[str, Any],
    how: Mapping[str, Any],
) -> Callable[..., Any]:
    """An op that returns the gradients of some parameters."""
    returns = " ".join(f"d{n}" for n in of)
    declared = _declared(name, body, types, _tensors(returns), defaults)
    return define_op(returns=returns, **how)(declared)


def _tensors(returns: str) -> Any:
    """The annotation of outputs with these names."""
    names = returns.split()
    return tuple[tuple(Tensor for _ in names)] if len(names) > 1 else Tensor if names else None


def _on_tuple(function: Callable[[tuple[Any, ...]], Any]) -> Callable[..., Any]:
    return lambda *args: function(args)


def _if_given(x: Tensor | None, dx: Tensor) -> Tensor | None:
    return None if x is None else dx


def _taking(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The function with parameters of these names, for what passes values by name."""
    kind, taking = inspect.Parameter.POSITIONAL_OR_KEYWORD, functools.partial(function)
    signature = inspect.Signature([inspect.Parameter(n, kind) for n in names])
    vars(taking)["__signature__"] = signature
    return taking


def _declared(
    name: str,
    body: Callable[..., Any],
    types: Mapping[str, Any],
    returns: Any,
    defaults: Mapping[str, Any],
) -> Callable[..., Any]:
    """A function as if it had been written with these parameters and annotations.

    A parameter has its default where all after it have one.
    """
    names = list(types)
    last = max((i for i, n in enumerate(names) if defaults.get(n, _NONE) is _NONE), default=-1)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(n, kind, annotation=types[n], default=defaults[n] if i > last else _NONE)
        for i, n in enumerate(names)
    ]
    body.__name__ = body.__qualname__ = name
    body.__annotations__ = {**types, "return": returns}
    vars(body)["__signature__"] = inspect.Signature(parameters, return_annotation=returns)
    return body
