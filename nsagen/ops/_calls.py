"""Remembers calls by what they look like.

Checks and kernel look-up only see a tensor's shape, strides, dtype and device. A call that has the
same of these and the same other arguments as an earlier one skips both.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack
except ImportError:  # another release's names: every call goes through the dispatcher
    peek_interpreter_stack = None
    _profiler_enabled = bool

# What torch.compile compares tensors with, in a tenth of a microsecond.
TensorGuards = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None
)

Args = tuple[Any, ...]
Known = TypeVar("Known")

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors whose calls can be remembered. A subclass may have to see each call."""

_MAX_CALLS = 4096
_MAX_ALIKE = 16


_all: weakref.WeakSet[KnownCalls[Any]] = weakref.WeakSet()


class KnownCalls(Generic[Known]):
    """What was learned about calls, by what they look like.

    Args:
        is_tensor: for each argument, whether it is a tensor or None. The first argument is a
            tensor, and arguments that aren't tensors must be hashable.
    """

    def __init__(self, is_tensor: Sequence[bool]) -> None:
        self._places = tuple(i for i, tensor in enumerate(is_tensor) if tensor)
        self._others = picker([i for i, tensor in enumerate(is_tensor) if not tensor])
        self._known: dict[object, tuple[_Look[Known], ...]] = {}
        self._count = 0
        _all.add(self)

    def clear(self) -> None:
        self._known.clear()
        self._count = 0

    def find(self, args: Args) -> Known | None:
        """What was learned from an earlier call that looked like this one."""
        key = (args[0].shape, self._others(args))
        looks = self._known.get(key, ())
        for look in looks:
            if look.check(*look.tensors(args)) and all_none(look.absent(args)):
                if look is not looks[0]:  # the next ones will probably look like this one too
                    self._known[key] = (look, *(other for other in looks if other is not look))
                return look.known
        return None

    def learn(self, args: Args, known: Known) -> None:
        """Remember something about a call on plain tensors. Clears the cache after 4096 calls."""
        if self._count >= _MAX_CALLS:
            self.clear()
        present = [i for i in self._places if args[i] is not None]
        look = _Look(args, present, [i for i in self._places if args[i] is None], known)
        # Other threads may read or replace the entry meanwhile, so it is never changed in place.
        key = (args[0].shape, self._others(args))
        self._known[key] = (look, *self._known.get(key, ()))[:_MAX_ALIKE]
        self._count += 1

    def tensors(self, args: Args) -> list[Tensor]:
        """The tensors among a call's arguments."""
        return [args[i] for i in self._places if args[i] is not None]


def forget() -> None:
    """Forget all calls of all ops."""
    for calls in _all:
        calls.clear()


class _Look(Generic[Known]):
    """What one call looks like, and what was learned from it."""

    __slots__ = ("absent", "check", "known", "tensors")

    def __init__(self, args: Args, present: list[int], absent: list[int], known: Known) -> None:
        self.tensors, self.absent = picker(present), picker(absent)
        self.check: Callable[..., bool] = _looks([args[i] for i in present]).check
        self.known = known


def all_none(values: Sequence[Any]) -> bool:
    """Whether all values are None; tuple.count would compare tensors with None, and a generator
    takes longer."""
    for value in values:  # noqa: SIM110
        if value is not None:
            return False
    return True


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor is an instance of a subclass."""
    return all(type(tensor) in PLAIN for tensor in tensors)


def unobserved() -> bool:
    """Whether only the result of a call counts: no compiler, tracer, mode, transform or profiler
    must observe it. Gradients are another matter."""
    return not (torch.compiler.is_compiling() or transformed() or profiled())


def transformed() -> bool:
    """Whether a mode, a tracer or a transform is active."""
    return (
        peek_interpreter_stack is None
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _get_tracing_state() is not None
    )


def functional() -> bool:
    """Whether a transform of torch.func that differentiates or batches is the innermost one."""
    innermost = None if peek_interpreter_stack is None else peek_interpreter_stack()
    return innermost is not None and innermost.key().name in ("Grad", "Vmap")


def profiled() -> bool:
    """Whether a profiler is active. It has to see each op."""
    return _profiler_enabled()


def picker(places: Sequence[int]) -> Callable[[Args], Args]:
    """Picks some of a call's arguments, as a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    if not places:
        return lambda args: ()
    (place,) = places
    return lambda args: (args[place],)


def _looks(tensors: list[Tensor]) -> Any:
    """Tells whether tensors agree with these in type, shape, strides, dtype and device."""
    if TensorGuards is not None:
        guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
        if guards.check(*tensors):  # not where one tensor comes twice
            return guards
    return _Looks(tensors)


class _Looks:
    """The same in Python, ten times slower."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._seen = self._all(tensors)

    def check(self, *tensors: object) -> bool:
        return self._all(tensors) == self._seen

    @staticmethod
    def _all(tensors: Iterable[Any]) -> list[object]:
        return [
            type(x) in PLAIN and (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
            for x in tensors
        ]
