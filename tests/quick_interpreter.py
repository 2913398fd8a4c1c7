"""Removes overhead from Triton's interpreter, so that kernel tests take a third of the time.

Kernels of tests work on small tiles, where nearly all of the interpreter's time is Python around
NumPy: it patches the functions of `tl` again at each call of a device function, builds the types of
tiles anew for each operation, and repeats integer arithmetic in 64 bits to detect overflows, which
it reports in debug mode only. What kernels compute stays the same to the bit:
tests/kernels/test_quick_interpreter.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter of this process quicker, until the patch is undone."""
    _replace_language_once_a_launch(patch)
    _remember_types(patch)
    _skip_unreported_overflow_checks(patch)


def _replace_language_once_a_launch(patch: pytest.MonkeyPatch) -> None:
    """The functions of `tl` stay patched until the launch ends, so once is enough."""
    replace, scope = interpreter._patch_lang, interpreter._LangPatchScope
    replaced: set[tuple[int, ...]] = set()
    languages: dict[Any, tuple[int, ...]] = {}

    class Scope(scope):
        def restore(self) -> None:
            replaced.clear()
            super().restore()

    def replace_once(function: Any) -> Any:
        key = languages.get(function)
        if key is None:
            modules = {id(module) for module in function.__globals__.values()}
            key = languages[function] = tuple(id(m) for m in (tl, tl.core) if id(m) in modules)
        if key in replaced:
            return Scope()
        replaced.add(key)
        return replace(function)

    patch.setattr(interpreter, "_LangPatchScope", Scope)
    patch.setattr(interpreter, "_patch_lang", replace_once)


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """Types are values: those of one shape and one type of elements are all alike."""
    make_block_type, dtype_in_numpy = tl.block_type.__init__, interpreter._get_np_dtype
    broadcast = TritonSemantic.broadcast_impl_value
    shapes: dict[tuple[int, ...], Any] = {}
    block_types: dict[Any, dict[str, Any]] = {}
    parts: dict[tuple[int, ...], tuple[Any, Any]] = {}
    in_numpy: dict[str, Any] = {}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([n.value if type(n) is tl.constexpr else n for n in shape])
        key = (element_ty.name, type(shape), sizes)
        known = block_types.get(key)
        if known is None:
            make_block_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            known = block_types[key] = dict(vars(self))
        vars(self).update(known, element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape.values) if type.is_block() else ()
        known = parts.get(sizes)
        if known is None:
            shape = tl.tuple([tl.constexpr(n) for n in sizes])
            known = parts[sizes] = tl.constexpr(math.prod(sizes)), shape
        self.numel, self.shape = known

    def in_numpy_of(dtype: Any) -> Any:
        known = in_numpy.get(dtype.name)
        if known is None:
            known = in_numpy[dtype.name] = dtype_in_numpy(dtype)
        return known

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape is other.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    patch.setattr(tl.block_type, "__init__", init_block_type)
    patch.setattr(tl.tensor, "__init__", init_tensor)
    patch.setattr(interpreter, "_get_np_dtype", in_numpy_of)
    patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_values)


def _skip_unreported_overflow_checks(patch: pytest.MonkeyPatch) -> None:
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", options)
