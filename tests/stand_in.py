"""A GPU that only takes notes: whole calls on CPU tensors, whose launches do nothing.

Kernels are found in a generated package, as for an H200, and go through Triton's JIT as ever, but
instead of compiling one it gets a stand-in for its arguments' types and constants.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nsagen
from nsagen.ops._calls import forget
from nsagen.runtime import Dispatcher


@dataclass(frozen=True)
class Launch:
    """A launch: by whom, of what, and its arguments with tensors as addresses."""

    by_jit: bool
    kernel: str
    grid: tuple[int, int, int]
    stream: int
    args: tuple[Any, ...]


@dataclass
class StandIn:
    """The driver. `kept` holds every tensor that was allocated, so that no address comes twice."""

    launches: list[Launch] = field(default_factory=list, repr=False)
    kept: list[Any] = field(default_factory=list, repr=False)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def compiled(self, kernel: Any, key: Any) -> Any:
        """What the JIT launches in place of a compiled kernel."""

        def run(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            self.kept.append(rest)
            args = tuple(map(_plain, rest[4:]))
            self.launches.append(Launch(rest[2] is not None, name, (x, y, z), stream, args))

        name = f"{kernel.__name__} {key}"
        return SimpleNamespace(
            run=run, function=object(), packed_metadata=(), launch_metadata=lambda *args: None
        )

    def of(self, call: Callable[[], Any]) -> list[Launch]:
        """The launches of a call."""
        self.launches.clear()
        self.kept.append(call())
        return [*self.launches]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("address", _address(value))
    if hasattr(value, "block_shape"):
        base = value.base
        address = _address(base) if isinstance(base, Tensor) else base.data_ptr()
        return ("address", address), tuple(value.shape), tuple(value.strides), value.block_shape
    return ("address", value) if isinstance(value, int) and value > 1 << 32 else value


def _address(tensor: Tensor) -> int:
    start = tensor.untyped_storage().data_ptr()
    return start + int(tensor.storage_offset()) * tensor.element_size()


def same_up_to_addresses(one: list[Launch], other: list[Launch]) -> None:
    """Assert that launches agree, with addresses that stand for each other throughout."""
    assert [launch.kernel for launch in one] == [launch.kernel for launch in other]
    there: dict[int, int] = {}
    back: dict[int, int] = {}

    def match(a: Any, b: Any) -> None:
        if isinstance(a, tuple) and len(a) == 2 and a[0] == "address":
            assert there.setdefault(a[1], b[1]) == b[1]
            assert back.setdefault(b[1], a[1]) == a[1]
        elif isinstance(a, tuple):
            for x, y in zip(a, b, strict=True):
                match(x, y)
        else:
            assert a == b

    for first, second in zip(one, other, strict=True):
        assert (first.grid, first.stream) == (second.grid, second.stream)
        match(first.args, second.args)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """CPU tensors count as a GPU's; needs a process without Triton's interpreter."""
    triton = pytest.importorskip("triton")
    from triton.runtime import driver

    from nsagen.ops import _fixed_kernels
    from nsagen.runtime import recorder

    importlib.reload(_fixed_kernels)  # another test may have imported interpreted ones
    stand_in = StandIn()
    forget()  # calls that went elsewhere
    monkeypatch.setattr(
        triton.JITFunction,
        "_do_compile",
        lambda self, key, *args, **named: stand_in.compiled(self, key),
    )
    here = {
        "on_kernels": lambda x: x.dtype is not torch.float64,
        "replays": lambda x: True,
        "values_are_read": lambda x: False,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("nsagen."):
            for attribute in here.keys() & vars(module).keys():
                monkeypatch.setattr(module, attribute, here[attribute])
    monkeypatch.setattr(_fixed_kernels, "runs_on", lambda x: True)
    monkeypatch.setattr(Dispatcher, "_target", lambda *args: "cuda:90")
    for holder, names in (
        (torch, ("empty", "empty_strided", "zeros", "cumsum", "stack", "neg", "add")),
        (Tensor, ("new_empty", "new_full", "new_zeros", "clone", "contiguous", "to")),
    ):
        for name in names:
            monkeypatch.setattr(holder, name, _keeping(getattr(holder, name), stand_in.kept))
    repeated = recorder._REPEATED
    for operation, function in repeated.items():
        monkeypatch.setitem(repeated, operation, _keeping(function, stand_in.kept))
    previous = driver._active
    driver.set_active(stand_in)  # type: ignore[arg-type]
    yield stand_in
    forget()
    driver.set_active(previous)  # type: ignore[arg-type]


def _keeping(function: Callable[..., Tensor], kept: list[Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **named: Any) -> Tensor:
        result = function(*args, **named)
        kept.append(result)
        return result

    return call


def dispatcher() -> Dispatcher:
    """One that only looks into the package for Llama-3.1-8B's shape, which is committed."""
    return nsagen.load("llama8b").with_on_missing("error")
