"""Ahead-of-time compilation of variants for any target, without a GPU.

A kernel is compiled exactly as its own `launch` would compile it. The launch runs on meta
tensors, its kernel calls are recorded instead of executed, and each goes to Triton's own
just-in-time path with a driver that only names the target. So a launch of the same sizes finds
the compiled kernel in Triton's cache on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nsagen.aot.resources import Resources, read_resources
from nsagen.cases.base import Case, Sizes, cases_of
from nsagen.core.errors import BuildError
from nsagen.core.importing import import_file
from nsagen.core.target import Target
from nsagen.core.workload import Workload

# A plausible call: compilation depends on it only through specialization of sizes.
_EXAMPLE_SIZES = Sizes(seqlens=(65536,), kv_heads=4, capacity=8192)
_SHORT_SIZES = Sizes(seqlens=(2048,), kv_heads=4, capacity=8192)
_EXAMPLE_DECODE_SIZES = Sizes(seqlens=(4095, 1000), kv_heads=4, capacity=8192)

_LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


@dataclass(frozen=True)
class RecordedLaunch:
    """One kernel call that a `launch` made: the kernel, its grid, arguments and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


@dataclass
class _Recorder:
    """Stands in for a kernel in a module and records how it is called."""

    kernel: Any
    calls: list[RecordedLaunch] = field(default_factory=list)
    grid: tuple[int, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        return replace(self, grid=grid)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _LAUNCH_OPTIONS & kwargs.keys()}
        named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        for param in self.kernel.params:
            if param.name not in named:
                named[param.name] = param.default
        self.calls.append(RecordedLaunch(self.kernel, self.grid, named, options))


@contextmanager
def recording(module: ModuleType) -> Iterator[list[RecordedLaunch]]:
    kernels = {n: v for n, v in vars(module).items() if isinstance(v, triton.JITFunction)}
    calls: list[RecordedLaunch] = []
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, calls))
        yield calls
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


@dataclass(frozen=True)
class _NamedTarget:
    """The part of a Triton driver that compiling needs: which target it is for."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def _compiling_for(target: Target) -> Iterator[None]:
    arch = int(target.arch) if target.arch.isdigit() else target.arch
    previous = driver._active
    driver.set_active(_NamedTarget(GPUTarget(target.backend, arch, target.warp_size)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver.set_active(previous)  # type: ignore[arg-type]


def recorded_launches(
    path: Path, workload: Workload, sizes: Sizes | None = None
) -> tuple[RecordedLaunch, ...]:
    """The first call of each kernel that a variant's `launch` makes, in order.

    Args:
        sizes: of the call; plausible ones by default, which decide only the specialization. A
            launch may choose its kernels by them: those for long and for short sequences come.

    Raises:
        BuildError: `launch` calls no kernel.
    """
    plausible = (_EXAMPLE_SIZES, _SHORT_SIZES)
    if workload.pass_ == "decode":
        plausible = (_EXAMPLE_DECODE_SIZES,)
    make_case = cases_of(workload).make_case
    cases = [make_case(workload, s, "meta") for s in ((sizes,) if sizes else plausible)]
    return first_calls(all_launches(path, *cases))


def all_launches(path: Path, *cases: Case) -> list[RecordedLaunch]:
    """Every kernel call that a variant's `launch` makes for cases on meta tensors, in order.

    A case may have nothing to do, such as one of sequences that are shorter than a window.

    Raises:
        BuildError: `launch` calls no kernel for any of them.
    """
    module = import_file(path)
    with recording(module) as calls:
        for case in cases:
            module.launch(*case.args)
    if not calls:
        raise BuildError(f"{path.stem}: launch must call a kernel, but it called none")
    return calls


def first_calls(calls: Sequence[RecordedLaunch]) -> tuple[RecordedLaunch, ...]:
    """The first call of each kernel, in order."""
    found: dict[str, RecordedLaunch] = {}
    for call in calls:
        found.setdefault(call.kernel.__name__, call)
    return tuple(found.values())


def compile_variant(
    path: Path, workload: Workload, target: Target, sizes: Sizes | None = None
) -> tuple[Resources, ...]:
    """Compile every kernel that a variant's `launch` calls, and read what each one uses.

    Returns:
        one `Resources` per kernel, in the order of first launch.

    Raises:
        BuildError: Triton cannot compile a kernel for the target.
    """
    return tuple(
        read_resources(call.kernel.__name__, compile_launch(call, target, path.stem), target)
        for call in recorded_launches(path, workload, sizes)
    )


def compile_launch(call: RecordedLaunch, target: Target, variant: str) -> Any:
    """Triton's compiled kernel of a recorded launch.

    Raises:
        BuildError: Triton cannot compile it for the target; the text names the variant.
    """
    args = [call.args[param.name] for param in call.kernel.params]
    options = {k: v for k, v in call.options.items() if k != "maxnreg" or target.backend == "cuda"}
    try:
        with _compiling_for(target):
            return call.kernel.warmup(*args, grid=(1,), **options)
    except Exception as error:  # Triton raises many types here; all mean the same to a build
        said = str(error).strip() or type(error).__name__  # an assertion may have no text
        raise BuildError(
            f"{variant}: kernel {call.kernel.__name__} must compile for {target}; "
            f"triton {triton.__version__} said: {said.splitlines()[-1]}"
        ) from error
