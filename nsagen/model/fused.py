"""Fused products of inference: when a model may use them, and the joined weights that they read.

In inference on kernels, layers that read the same input run as one product, and a norm, a
residual or an activation is fused into the product beside it. That reads weights without calling
the modules that hold them. So it happens only while every module is exactly nsagen's own: with a
hook, an adapter, a quantized layer or any other module, the whole model calls its modules.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as modules

from nsagen import ops

Kind = TypeVar("Kind", bound=type[nn.Module])

_FORWARD: dict[type, Callable[..., Any]] = {}
"""The forward of each class whose modules may be bare, as the class was written."""

_FUNCTIONS: set[Callable[..., Any]] = set()
"""The functions of these classes, as written. Names tell nothing: functools.wraps copies them."""

_CALL = nn.Module.__call__


def own(kind: Kind) -> Kind:
    """Class decorator: fused products may do the work of this class's forward.

    They never do after a patch of the class, as kernel collections apply them, or in a subclass.
    """
    _FORWARD[kind] = kind.forward
    _FUNCTIONS.update(f for f in (kind.forward, *vars(kind).values()) if inspect.isfunction(f))
    return kind


def is_own(function: Callable[..., Any]) -> bool:
    """Whether a function, or a method's function, is one that an `own` class was written with."""
    return getattr(function, "__func__", function) in _FUNCTIONS


for _plain in (nn.Linear, nn.Embedding, nn.ModuleList):
    _run = _plain.forward
    if _run.__module__.startswith("torch.") and not hasattr(_run, "__wrapped__"):
        own(_plain)

CAPTURING = threading.Lock()
"""Held while a step is captured: a capture starts by waiting for the device, which another
capture forbids."""


@dataclass(frozen=True)
class WeightState:
    """What a captured step depends on.

    Attributes:
        addresses: where weights, buffers and joined weights lie.
        contents: the storage of each weight and buffer, and how often it was written to.
    """

    addresses: tuple[int, ...]
    contents: tuple[tuple[int, int], ...]


def state_of(model: nn.Module) -> WeightState | None:
    """The state of a model's weights; None if it has a module that must be called."""
    if not is_bare_below(model):
        return None
    tensors, joined = [], []
    for module in _walk(model):
        own = module.__dict__
        tensors += own["_parameters"].values()
        tensors += own["_buffers"].values()
        if "joined" in own:
            joined.append(own["joined"].address)
    tensors = [tensor for tensor in tensors if tensor is not None]
    addresses = [tensor.data_ptr() for tensor in tensors]
    contents = [(tensor.untyped_storage()._cdata, tensor._version) for tensor in tensors]
    return WeightState((*addresses, *joined), tuple(contents))


def content_of(model: nn.Module) -> tuple[Any, ...]:
    """Changes when what a model computes may have changed: its modules, their hooks, and which
    tensors they hold, at which address and how often written to. A write through `.data`, or a
    switch in a module's Python, leaves no trace here."""
    found: list[Any] = [tuple(modules._global_forward_hooks)]
    for module in _walk(model):
        own = module.__dict__
        found.append((id(module), type(module), own.get("forward")))
        found.append((*own["_forward_hooks"], *own["_forward_pre_hooks"]))
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is not None:
                plain = type(tensor) in (nn.Parameter, Tensor)
                version = 0 if tensor.is_inference() else tensor._version
                found.append((id(tensor), tensor.data_ptr() if plain else 0, version))
    return tuple(found)


def is_bare_below(model: nn.Module) -> bool:
    """Whether all modules of a model are bare. It is fast, because each step waits for it."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return False
    if nn.Module.__call__ is not _CALL:
        return False
    todo = list(model.__dict__["_modules"].values())
    while todo:
        module = todo.pop()
        if module is None:
            continue
        if not is_bare(module):
            return False
        todo += module.__dict__["_modules"].values()
    return True


def may_fuse(model: nn.Module, weight: Tensor) -> bool:
    """Whether passes over the model run as fused products."""
    return ops.on_kernels(weight) and is_bare_below(model)


def renew_joined(model: nn.Module) -> None:
    """Copy all joined weights again: a write through `.data` leaves no version."""
    with CAPTURING:  # captures read them, so they must not be copied then
        joining = [m for m in _walk(model) if isinstance(m, JoinsWeights) and m.joined.address]
        copies = [module.joined.copied(*module.joined_layers()) for module in joining]
        for device in {copy.weight.device for copy in copies}:
            _wait(device)
        for module, copy in zip(joining, copies, strict=True):
            module.joined.hold(copy)


def refresh_joined(model: nn.Module) -> None:
    """Copy changed weights into the joined ones, in place."""
    for module in _walk(model):
        if isinstance(module, JoinsWeights) and module.joined.address:
            module.joined_weight()


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module does only what its class was written to do in nsagen or PyTorch."""
    own, kind = module.__dict__, type(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or is_patched(module):
        return False
    if _FORWARD.get(kind) is not kind.forward:
        return False
    for name, weight in own["_parameters"].items():
        if weight is None:
            continue
        if type(weight) is not nn.Parameter or weight.is_inference():
            return False
        if name == "bias" and isinstance(module, nn.Linear):
            return False
    return True


def is_patched(module: nn.Module) -> bool:
    """Whether an instance has a forward of its own; not if that is its class's, which programs put
    there when they take their patch out."""
    if "forward" not in module.__dict__:
        return False
    found = module.__dict__["forward"]
    bound = getattr(found, "__self__", None) is module
    return not (bound and getattr(found, "__func__", None) is type(module).forward)


def _walk(model: nn.Module) -> list[nn.Module]:
    """All modules; `modules()` takes several times as long."""
    found = [model]
    for module in found:
        found += [child for child in module.__dict__["_modules"].values() if child is not None]
    return found


@dataclass(frozen=True)
class _Copy:
    """Weights in one matrix.

    Attributes:
        source: of each weight, its storage, its address and how often it was written to.
        storages: keep the numbers of these storages from being used again.
        weight: the matrix.
    """

    source: list[tuple[int, int, int]]
    storages: list[StorageWeakRef]
    weight: Tensor


class JoinedWeight:
    """The weights of several linear layers in one matrix, so that one product does their work.

    It is a separate copy: the parameters stay what and where they are. It is made at the first
    read, updated in place after a weight changed, and made again after a weight moved. Copies and
    pickles of it are empty.
    """

    def __init__(self) -> None:
        self._held: _Copy | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> JoinedWeight:
        return JoinedWeight()

    def __reduce__(self) -> tuple[type[JoinedWeight], tuple[()]]:
        return JoinedWeight, ()

    @property
    def address(self) -> int:
        """Its address; 0 while it does not exist."""
        return 0 if self._held is None else self._held.weight.data_ptr()

    def drop(self) -> None:
        """Free the memory."""
        self._held = None

    def of(self, *layers: nn.Linear) -> Tensor:
        """The layers' weights [sum of out_features, in_features], without gradients."""
        held = self._held
        if held is not None and held.source == [_source(layer.weight) for layer in layers]:
            return held.weight
        copy = self.copied(*layers)
        _wait(copy.weight.device)
        self.hold(copy)
        return copy.weight

    def copied(self, *layers: nn.Linear) -> _Copy:
        """The layers' weights as they are now, in the memory of the matrix if they fit there; for
        `hold` once the device has copied them."""
        weights = [layer.weight for layer in layers]
        sources = [_source(weight) for weight in weights]
        storages = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        first = weights[0]
        shape = (sum(weight.shape[0] for weight in weights), first.shape[1])
        with torch.inference_mode(False), torch.no_grad():
            joined = None if self._held is None else self._held.weight
            if joined is None or _kind(joined) != (shape, first.dtype, first.device):
                joined = first.new_empty(shape)
            torch.cat([weight.detach() for weight in weights], out=joined)
        return _Copy(sources, storages, joined)

    def hold(self, copy: _Copy) -> None:
        """Read the weights from here; another thread may be reading."""
        self._held = copy


def _source(weight: Tensor) -> tuple[int, int, int]:
    return weight.untyped_storage()._cdata, weight.data_ptr(), weight._version


def _wait(device: torch.device) -> None:
    """Wait for the current stream: other streams may read next what it has written."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


class JoinsWeights(nn.Module):
    """A module that keeps a `JoinedWeight`, and frees it when its weights move."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = JoinedWeight()

    def joined_layers(self) -> Sequence[nn.Linear]:
        """The layers that read the same input, in the order of their rows."""
        raise NotImplementedError

    def joined_weight(self) -> Tensor:
        """Their weights as one, as they are now."""
        return self.joined.of(*self.joined_layers())

    def _apply(self, fn: Any, recurse: bool = True) -> JoinsWeights:
        self.joined.drop()
        return super()._apply(fn, recurse)
