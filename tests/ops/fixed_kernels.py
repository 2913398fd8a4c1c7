"""Compiles the small kernels that are not generated."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest


def compile_fixed(
    name: str, types: Mapping[str, str], constants: Mapping[str, Any], backend: str, arch: Any
) -> Any:
    """A kernel of `nsagen.ops._fixed_kernels`, compiled; arguments without a type are integers."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from nsagen.ops import _fixed_kernels

    kernel = getattr(importlib.reload(_fixed_kernels), name)
    signature = {
        n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names
    }
    source = triton.compiler.ASTSource(kernel, signature, dict(constants))
    return triton.compile(source, target=GPUTarget(backend, arch, 64 if backend == "hip" else 32))
