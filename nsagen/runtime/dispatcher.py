"""The dispatcher: maps a call to the kernel that serves it, and builds what is missing.

A custom op carries a dispatcher as text, its key, which `lookup` resolves. The registry of keys
only grows: a compiled graph may hold a key for as long as the process lives.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nsagen.core.bucket import Bucket, Entries, Table
from nsagen.core.errors import BuildError, InvalidInputError, UnsupportedWorkloadError
from nsagen.core.importing import LOCK, complete_before_forks
from nsagen.core.packages import remedy
from nsagen.core.releases import Releases, installed_release
from nsagen.core.workload import Workload
from nsagen.runtime.device import INTERPRETED_TARGET, device_slug, interpreting, target_of
from nsagen.runtime.missing import unsupported

if TYPE_CHECKING:
    import torch

DEFAULT = ""
"""The key of the default dispatcher: an empty table that builds whatever a call needs."""

_dispatchers: dict[str, Dispatcher] = {}

Launch = Callable[..., None]
OnMissing = Literal["build", "error"]


@dataclass(slots=True)
class _Entry:
    """A kernel for a bucket; its module is imported at the first call that it serves."""

    bucket: Bucket
    load: Callable[[], Launch]
    launch: Launch | None = field(default=None)

    def get(self) -> Launch:
        if self.launch is None:
            self.launch = one_at_a_time(self.load())
        return self.launch


def one_at_a_time(launch: Launch) -> Launch:
    """The launch, for one thread after another where Triton interprets.

    The interpreter replaces functions of Triton's language as long as a kernel runs.
    """
    return _OneAtATime(launch) if interpreting() else launch


class _OneAtATime:
    """Takes turns in calling a launch, whose attributes it has, such as the code's file."""

    def __init__(self, launch: Launch) -> None:
        functools.update_wrapper(self, launch)
        self._launch = launch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with LOCK:
            return self._launch(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_launch":  # asked by copy or pickle, before __init__
            raise AttributeError(name)
        return getattr(self._launch, name)


class Dispatcher:
    """Finds the kernel of a call in a package's table; builds it into the user cache on a miss.

    Args:
        name: of the spec that the package was generated from.
        package: import name of the folder with the kernels, e.g. "generated.llama8b.kernels".
        table: workload -> target -> ((bucket, module name), ...).
        triton: module name -> the releases of Triton that the kernel needs, if it needs particular
            ones. With another release, calls go to kernels of the table that run with every Triton.
        devices: device's slug, e.g. "nvidia-h200" -> workload -> entries, which come before those
            that the table has for the device's target.
        on_missing: "build" builds a variant that the table lacks with its target's default
            schedule and logs one line; "error" raises `UnsupportedWorkloadError`.

    Attributes:
        key: what custom ops carry instead of the object; see `lookup`.
    """

    def __init__(
        self,
        name: str,
        package: str,
        table: Table,
        on_missing: OnMissing = "build",
        triton: Mapping[str, Releases] | None = None,
        devices: Mapping[str, Mapping[Workload, Entries]] | None = None,
    ) -> None:
        if on_missing not in ("build", "error"):
            raise InvalidInputError(
                f'dispatcher {name}: on_missing must be "build" or "error"; got {on_missing!r}'
            )
        self.name = name
        self.package = package
        self.on_missing: OnMissing = on_missing
        self._table = table
        self._triton = triton or {}
        self._devices = devices or {}
        self._choices: dict[tuple[Workload, torch.device], list[_Entry]] = {}
        self._other: Dispatcher | None = None
        self.key = register(self, name if on_missing == "build" else f"{name}:error")

    def launcher(
        self,
        workload: Workload,
        device: torch.device,
        tokens: int,
        context: int | None = None,
    ) -> Launch:
        """The `launch` function of the kernel that serves a call.

        Args:
            device: where the tensors are.
            tokens: query tokens of the call or, when decoding, its rows.
            context: tokens that a query may look back on, if known without asking the device.

        Raises:
            UnsupportedWorkloadError: no variant covers the call, and building is off or impossible.
            InvalidInputError: bfloat16 in Triton's interpreter, whose tl.dot is wrong on it.
        """
        choices = self._choices.get((workload, device))
        if choices is None:
            choices = self._resolve(workload, device)
        for choice in choices:
            if choice.bucket.covers(tokens, context):
                return choice.launch or choice.get()
        choice = self._missing(workload, device, tokens)
        choices.append(choice)
        return choice.get()

    def has(self, workload: Workload, device: torch.device) -> bool:
        """Whether a workload that not every target covers has a kernel for a device.

        A package has those that were built with it; without one, whatever the installed nsagen
        and Triton can make is built.
        """
        if self._table or self.on_missing == "error":
            return len(self._resolve(workload, device)) > 0
        from nsagen.runtime.user_cache import can_build

        return can_build(workload, self._target(workload, device))

    def workloads(self) -> tuple[Workload, ...]:
        """The workloads of the table, in its order."""
        return tuple(self._table)

    def describe(self) -> list[dict[str, Any]]:
        """One row per variant of the table: its workload, target, sizes and module."""
        return [
            {
                "op": workload.op,
                "pass": workload.pass_,
                "dtype": workload.dtype,
                "params": dict(workload.params),
                "target": target,
                "sizes": str(bucket),
                "tokens": bucket.tokens,
                "context": bucket.context,
                "variant": module,
                "triton": str(self._triton.get(module, "")),
            }
            for workload, targets in self._table.items()
            for target, entries in targets.items()
            for bucket, module in entries
        ]

    def with_on_missing(self, on_missing: OnMissing) -> Dispatcher:
        """This dispatcher, or one on the same table that handles a miss the other way."""
        if on_missing == self.on_missing:
            return self
        with LOCK:
            if self._other is None:
                more = (on_missing, self._triton, self._devices)
                other = Dispatcher(self.name, self.package, self._table, *more)
                self._other, other._other = other, self
            return self._other

    def __repr__(self) -> str:
        targets = sorted({target for entry in self._table.values() for target in entry})
        return (
            f"Dispatcher({self.name!r}, {len(self._table)} workloads, "
            f"targets: {', '.join(targets) or 'none'}, on_missing={self.on_missing!r})"
        )

    def _resolve(self, workload: Workload, device: torch.device) -> list[_Entry]:
        target = self._target(workload, device)
        entries: Entries = self._table.get(workload, {}).get(target, ())
        if self._devices and device.type == "cuda":
            entries = (*self._devices.get(device_slug(device), {}).get(workload, ()), *entries)
        choices = [
            _Entry(bucket, self._loader(module))
            for bucket, module in entries
            if self._runs_here(module)
        ]
        return self._choices.setdefault((workload, device), choices)

    def _runs_here(self, module: str) -> bool:
        needed = self._triton.get(module)
        return needed is None or (release := installed_release()) is None or release in needed

    def _target(self, workload: Workload, device: torch.device) -> str:
        if interpreting() and workload.dtype == "bfloat16":
            raise InvalidInputError(
                f"dispatcher {self.name}: Triton's interpreter computes tl.dot wrongly on "
                f"bfloat16; got {workload}; use float32 or float16, or unset TRITON_INTERPRET"
            )
        if device.type != "cpu":
            return target_of(device)
        if not interpreting():
            raise UnsupportedWorkloadError(
                f"dispatcher {self.name}: kernels run on GPUs; got {workload} on the CPU; "
                "use nsagen.ops.reference, or set TRITON_INTERPRET=1 before importing triton"
            )
        return next(iter(self._table.get(workload, ())), INTERPRETED_TARGET)

    def _loader(self, module: str) -> Callable[[], Launch]:
        def load() -> Launch:
            try:
                with complete_before_forks():
                    return importlib.import_module(f"{self.package}.{module}").launch
            except (ImportError, SyntaxError, AttributeError) as error:
                raise BuildError(
                    f"dispatcher {self.name}: each kernel of its table must be whole; got {error} "
                    f"for {self.package}.{module}; {remedy(self.name, self.folder)}"
                ) from error

        return load

    @property
    def folder(self) -> Path | None:
        """The package's folder; None where it was imported from no file."""
        file = getattr(sys.modules.get(self.package.rpartition(".")[0]), "__file__", None)
        return None if file is None else Path(file).parent

    def _missing(self, workload: Workload, device: torch.device, tokens: int) -> _Entry:
        target = self._target(workload, device)
        if self.on_missing == "error":
            covered = self._table.get(workload, {}).get(target, ())
            reason = 'on_missing is "error"'
            needed = sorted({str(r) for _, m in covered if (r := self._triton.get(m))})
            if covered and not any(self._runs_here(module) for _, module in covered):
                reason = f"its kernels need Triton {' or '.join(needed)}, and {reason}"
            elif covered:
                sizes = "; ".join(str(bucket) for bucket, _ in covered)
                reason = f"it covers only {sizes}, not {tokens} tokens, and {reason}"
            raise unsupported(workload, target, self.name, reason)
        with complete_before_forks():
            from nsagen.runtime.user_cache import cached_variant, load_kernel

        path = cached_variant(workload, target, self.name)
        return _Entry(Bucket(), lambda: load_kernel(path).launch)


def register(dispatcher: Dispatcher, key: str) -> str:
    """Keep a dispatcher under `key`, or under `key#2`, `key#3`, ... if that is taken.

    The key of a process's first dispatcher of a name is the name alone, so it is the same in
    every process: exported graphs rely on it.
    """
    with LOCK:
        free, number = key, 1
        while free in _dispatchers or free == DEFAULT:
            number += 1
            free = f"{key}#{number}"
        _dispatchers[free] = dispatcher
        return free


def lookup(key: str) -> Dispatcher:
    """The dispatcher registered under `key`.

    Raises:
        InvalidInputError: no dispatcher has that key in this process.
    """
    found = _dispatchers.get(key)
    if found is not None:
        return found
    if key == DEFAULT:
        return default_dispatcher()
    name = key.partition("#")[0].partition(":")[0]
    raise InvalidInputError(
        f"dispatcher: must be registered in this process; got {key!r}; "
        f"known: {', '.join(filter(None, _dispatchers)) or 'none'}; "
        f'call nsagen.load("{name}") first'
    )


def use_by_default(dispatcher: Dispatcher) -> None:
    """Let calls that name no dispatcher use this one, for the life of the process."""
    _dispatchers[DEFAULT] = dispatcher


def default_dispatcher() -> Dispatcher:
    """The dispatcher of calls that name no dispatcher."""
    with LOCK:
        return _default()


@functools.cache
def _default() -> Dispatcher:
    return Dispatcher(name="default", package="", table={})
