"""What decoding calls of one op need, checked and looked up once for all calls that look alike.

A decoding step makes a few calls a layer, each of a few microseconds on the device. Their checks
see nothing of a tensor but its shape, strides, dtype and device, and so does the dispatcher: a
call that agrees with an earlier one in all of these needs neither again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsagen.runtime.replay import ReplayedLaunch

# torch.compile's own means: a comparison takes a tenth of a microsecond, an allocation a half.
_fast: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards = getattr(_fast, "TensorGuards", None)
_empty_strided_cuda = getattr(_fast, "_empty_strided_cuda", None)
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

Args = tuple[Any, ...]
Outputs = Sequence[Tensor]

_MAX_CALLS = 4096
_PLAIN = (Tensor, nn.Parameter)


class KnownCalls:
    """The calls of an op that were found right, by what they look like.

    Args:
        tensors: which of the op's arguments are tensors or None; the first is never None.
            Arguments that are no tensors can be hashed.
        arguments: how many the op has.
        allocate: makes the outputs of a call, contiguous and on the first tensor's device; their
            shapes and dtypes follow from what the call looks like.
        to_launch: the arguments of the kernel's `launch`, from a call's and its outputs.
    """

    def __init__(
        self,
        tensors: Iterable[int],
        arguments: int,
        allocate: Callable[[Args], Outputs],
        to_launch: Callable[[Args, Outputs], Args],
    ) -> None:
        self._places = tuple(tensors)
        self._others = _picker([i for i in range(arguments) if i not in self._places])
        self._allocate, self._to_launch = allocate, to_launch
        self._known: dict[object, tuple[KnownCall, ...]] = {}
        self._count = 0

    def find(self, args: Args) -> KnownCall | None:
        """An earlier call that looked like this one."""
        known = self._known.get(self._others(args), ())
        for call in known:
            absent = call.absent(args)
            if call.check(*call.tensors(args)) and absent.count(None) == len(absent):
                if call is not known[0]:  # the next ones will probably look like this one too
                    rest = tuple(other for other in known if other is not call)
                    self._known[self._others(args)] = (call, *rest)
                return call
        return None

    def learn(self, args: Args, kernel: Callable[..., None]) -> KnownCall:
        """Remember a call and the `launch` of its kernel.

        Whoever has seen too many different calls forgets them all.
        """
        present = tuple(i for i in self._places if args[i] is not None)
        tensors = [args[i] for i in present]
        plain = all(type(tensor) in _PLAIN for tensor in tensors)
        if plain and args[0].is_cuda and not torch.version.hip:
            kernel = ReplayedLaunch(kernel)
        looks = _looks(tensors)
        call = KnownCall(
            tensors=_picker(present),
            absent=_picker([i for i in self._places if args[i] is None]),
            check=looks.check,
            kernel=kernel,
            outputs=tuple((tuple(x.shape), x.stride(), x.dtype) for x in self._allocate(args)),
            to_launch=self._to_launch,
            device=args[0].get_device(),
            requires_grad=any(tensor.requires_grad for tensor in tensors),
        )
        if plain:  # a subclass may want to see each call
            if self._count >= _MAX_CALLS:
                self._known.clear()
                self._count = 0
            key = self._others(args)
            self._known[key] = (call, *self._known.get(key, ()))
            self._count += 1
        return call


@dataclass(frozen=True, slots=True)
class KnownCall:
    """What was found out for one call and those that look like it.

    Attributes:
        tensors: picks them from the op's arguments.
        absent: picks those that would be tensors, and are None.
        check: whether tensors look like this call's.
        kernel: the `launch` of its kernel.
        outputs: shapes, strides and dtypes.
        to_launch: the arguments of `kernel`.
        device: index of the GPU; -1 for a CPU.
        requires_grad: whether any tensor does.
    """

    tensors: Callable[[Args], Args]
    absent: Callable[[Args], Args]
    check: Callable[..., bool]
    kernel: Callable[..., None]
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    to_launch: Callable[[Args, Outputs], Args]
    device: int
    requires_grad: bool

    def run(self, args: Args) -> Any:
        """Allocate the outputs of a call, run its kernel and return them."""
        on_gpu = self.device >= 0
        if on_gpu and _current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(args)
        empty = _empty_on_gpu if on_gpu else _empty
        outputs = [empty(*output) for output in self.outputs]
        self.kernel(*self.to_launch(args, outputs))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _picker(places: Sequence[int]) -> Callable[[Args], Args]:
    """Picks some of a call's arguments, as a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda args: tuple(args[i] for i in places)


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
    """The same in Python, at ten times the cost."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._seen = self._all(tensors)

    def check(self, *tensors: object) -> bool:
        return self._all(tensors) == self._seen

    @staticmethod
    def _all(tensors: Iterable[Any]) -> list[object]:
        return [
            type(x) in _PLAIN and (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
            for x in tensors
        ]


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)


def _empty_on_current_gpu(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


_empty_on_gpu = _empty_strided_cuda or _empty_on_current_gpu
