"""Ahead-of-time compilation of variants for any target, with no GPU present.

A kernel is compiled exactly as its own `launch` would compile it: the launch runs on
meta tensors, its kernel calls are recorded instead of executed, and the recorded
arguments are specialized as Triton's runtime specializes them (1 becomes a constant,
multiples of 16 are marked divisible).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nsagen.codegen.resources import Resources, read_resources
from nsagen.codegen.target import Target
from nsagen.errors import BuildError
from nsagen.harness.base import Sizes, harness_of
from nsagen.workload import Workload

# A plausible call: what is compiled depends on it only through specialization of sizes.
_EXAMPLE_SIZES = Sizes(seqlens=(4096,), kv_heads=4, capacity=8192)
_EXAMPLE_DECODE_SIZES = Sizes(seqlens=(4095, 1000), kv_heads=4, capacity=8192)

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.bool: "*i1",
}

_LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


@dataclass(frozen=True)
class RecordedLaunch:
    """One kernel call that a `launch` made: the kernel, its arguments and options."""

    kernel: Any
    args: dict[str, Any]
    options: dict[str, Any]


@dataclass
class _Recorder:
    """Stands in for a kernel in a module and notes how it is called."""

    kernel: Any
    calls: list[RecordedLaunch] = field(default_factory=list)

    def __getitem__(self, grid: object) -> _Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _LAUNCH_OPTIONS & kwargs.keys()}
        named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        for param in self.kernel.params:
            if param.name not in named:
                named[param.name] = param.default
        self.calls.append(RecordedLaunch(self.kernel, named, options))


@contextmanager
def _recording(module: ModuleType) -> Iterator[list[RecordedLaunch]]:
    kernels = {n: v for n, v in vars(module).items() if isinstance(v, triton.JITFunction)}
    calls: list[RecordedLaunch] = []
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, calls))
        yield calls
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def load_module(path: Path) -> ModuleType:
    """Import a generated kernel file from its path."""
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise BuildError(f"{path}: must be a Python file; it cannot be imported")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def compile_variant(path: Path, workload: Workload, target: Target) -> tuple[Resources, ...]:
    """Compile every kernel that a variant's `launch` calls, and read what each one uses.

    Returns:
        one `Resources` a kernel, in the order of first launch.

    Raises:
        BuildError: Triton cannot compile a kernel for the target.
    """
    module = load_module(path)
    sizes = _EXAMPLE_DECODE_SIZES if workload.pass_ == "decode" else _EXAMPLE_SIZES
    with _recording(module) as calls:
        case = harness_of(workload).make_case(workload, sizes, "meta")
        module.launch(*case.args)
    if not calls:
        raise BuildError(f"{path.stem}: launch must call a kernel, but it called none")
    first_calls = {call.kernel.__name__: call for call in reversed(calls)}
    names = dict.fromkeys(call.kernel.__name__ for call in calls)
    return tuple(_compile(first_calls[name], target, path.stem) for name in names)


def _compile(call: RecordedLaunch, target: Target, variant: str) -> Resources:
    source = _source_of(call)
    arch = int(target.arch) if target.arch.isdigit() else target.arch
    gpu = GPUTarget(target.backend, arch, target.warp_size)
    try:
        compiled = triton.compile(source, target=gpu, options=call.options)
    except Exception as error:  # Triton raises many types here; each means the same to a build
        raise BuildError(
            f"{variant}: kernel {call.kernel.__name__} must compile for {target}; "
            f"triton {triton.__version__} said: {str(error).strip().splitlines()[-1]}"
        ) from error
    return read_resources(call.kernel.__name__, compiled, target)


def _source_of(call: RecordedLaunch) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, param in enumerate(call.kernel.params):
        value = call.args[param.name]
        if param.is_constexpr or value is None or (value == 1 and isinstance(value, int)):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        signature[param.name] = _type_of(param.name, value)
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def _type_of(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise BuildError(f"kernel argument {name}: must be a tensor or number, got {type(value)}")
