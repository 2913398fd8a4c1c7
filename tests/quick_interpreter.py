"""Removes overhead from Triton's interpreter, so that kernel tests take a third of the time.

Kernels of tests work on small tiles, where nearly all of the interpreter's time is Python around
NumPy: it patches the functions of `tl` again at each call of a device function, builds the types of
tiles anew for each operation, and repeats integer arithmetic in 64 bits to detect overflows, which
it reports in debug mode only. What kernels compute stays the same to the bit:
tests/kernels/test_quick_interpreter.py.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import linecache
import math
import types
from pathlib import Path
from typing import Any

import pytest
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter of this process quicker, until the patch is undone."""
    _replace_language_once_a_launch(patch)
    _call_functions_of_the_language_directly(patch)
    _remember_types(patch)
    _check_sizes_of_elements_once_a_type(patch)
    _skip_conversions_to_what_is_there(patch)
    _rewrite_equal_functions_once(patch)
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


def _call_functions_of_the_language_directly(patch: pytest.MonkeyPatch) -> None:
    """Each call of a `tl` function passes a wrapper that copies its keywords, and one that checks
    for the keyword which the first adds; and unwraps arguments that are mostly plain values."""
    replace, unwrap = interpreter._patch_attr, tl.core._unwrap_if_constexpr
    semantic = getattr(interpreter, "interpreter_semantic", None)  # from Triton 3.7 on
    checked = tl.core.builtin(lambda: None).__code__
    constexpr, plain = tl.constexpr, {tl.tensor, tl.dtype, int, float, bool, str, type(None)}
    direct: dict[Any, Any] = {}

    def made_direct(member: Any) -> Any:
        function = member.__wrapped__ if member.__code__ is checked else member

        def call(*args: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return function(*args, **named)

        return call

    def replace_directly(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if semantic is None or not isinstance(member, types.FunctionType):
            return replace(obj, name, member, builder, scope)
        if member not in direct:
            direct[member] = made_direct(member)
        return scope.set_attr(obj, name, direct[member])

    def unwrap_quickly(value: Any) -> Any:
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    patch.setattr(interpreter, "_patch_attr", replace_directly)
    patch.setattr(tl.core, "_unwrap_if_constexpr", unwrap_quickly)


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """Types are values: those of one shape and one type of elements are all alike."""
    make_block_type, dtype_in_numpy = tl.block_type.__init__, interpreter._get_np_dtype
    computation_type = TritonSemantic.computation_type_impl
    make_of_elements = tl.block_type.with_element_ty
    shapes: dict[tuple[int, ...], Any] = {}
    block_types: dict[Any, dict[str, Any]] = {}
    parts: dict[tuple[int, ...], tuple[Any, Any]] = {}
    in_numpy: dict[str, Any] = {}
    computation_types: dict[Any, Any] = {}
    same_shape: dict[tuple[str, str], Any] = {}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([n.value if type(n) is tl.constexpr else n for n in shape])
        key = (element_ty.name, type(shape), sizes)
        known = block_types.get(key)
        if known is None:
            make_block_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            known = block_types[key] = dict(vars(self))
        vars(self).update(known, element_ty=element_ty)

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        key = (self.name, scalar_ty.name)
        known = same_shape.get(key)
        if known is None or known.element_ty is not scalar_ty:
            known = same_shape[key] = make_of_elements(self, scalar_ty)
        return known

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

    def computation_type_of(
        self: Any, a_ty: Any, a_is_scalar: bool, b_ty: Any, b_is_scalar: bool, div_or_mod: bool
    ) -> Any:
        key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
        known = computation_types.get(key)
        if known is None:
            known = computation_types[key] = computation_type(
                self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod
            )
        return known

    patch.setattr(tl.block_type, "__init__", init_block_type)
    patch.setattr(tl.block_type, "with_element_ty", with_element_ty)
    patch.setattr(tl.tensor, "__init__", init_tensor)
    patch.setattr(interpreter, "_get_np_dtype", in_numpy_of)
    patch.setattr(TritonSemantic, "computation_type_impl", computation_type_of)


def _check_sizes_of_elements_once_a_type(patch: pytest.MonkeyPatch) -> None:
    """Each handle compares the bytes of its elements with those of its type."""
    handle, fits = interpreter.TensorHandle, interpreter._validate_np_data_size
    known: set[tuple[Any, str]] = set()

    def check(self: Any) -> None:
        key = (self.data.dtype, self.dtype.name)
        if key not in known:
            check_of_triton(self)
            known.add(key)

    def fits_by_type(data: Any, dtype: Any) -> bool:
        return (data.dtype, dtype.name) in known or fits(data, dtype)

    check_of_triton = handle.__post_init__
    patch.setattr(handle, "__post_init__", check)
    patch.setattr(interpreter, "_validate_np_data_size", fits_by_type)


def _skip_conversions_to_what_is_there(patch: pytest.MonkeyPatch) -> None:
    """Most operands of an operation have one type, and many one shape, before it converts them."""
    broadcast, cast = TritonSemantic.broadcast_impl_value, TritonSemantic.cast
    check_types = TritonSemantic.binary_op_type_checking_impl
    tensor = tl.tensor
    constants: dict[tuple[Any, ...], Any] = {}

    def expand(self: Any, value: Any, sizes: list[int]) -> Any:
        if value.type.shape.values == sizes:
            return value
        handle = self.builder.create_broadcast(value.handle, sizes)
        make = getattr(self, "make_tensor", None) or self.tensor  # the first from Triton 3.7 on
        return make(handle, tl.block_type(value.dtype, sizes))

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if not (one.is_block() and other.is_block()):
            return broadcast(self, lhs, rhs) if one.is_block() or other.is_block() else (lhs, rhs)
        if one.shape is other.shape:
            return lhs, rhs
        pairs = list(zip(one.shape.values, other.shape.values, strict=False))
        if len(one.shape) != len(other.shape) or any(1 not in p and p[0] != p[1] for p in pairs):
            return broadcast(self, lhs, rhs)  # which adds axes or refuses
        sizes = [max(pair) for pair in pairs]
        return expand(self, lhs, sizes), expand(self, rhs, sizes)

    def cast_unless_same(self: Any, input: Any, dst_ty: Any, *rest: Any, **options: Any) -> Any:
        if input.dtype is dst_ty:
            return input
        return cast(self, input, dst_ty, *rest, **options)

    def check_different_types(self: Any, lhs: Any, rhs: Any, *rest: Any, **options: Any) -> Any:
        if type(lhs) is type(rhs) is tensor and lhs.dtype is rhs.dtype and lhs.dtype.name in plain:
            return self.broadcast_impl_value(lhs, rhs)
        tile_and_number = type(lhs) is tensor and type(rhs) in (int, float) and lhs.type.is_block()
        if options or not tile_and_number:
            return check_types(self, lhs, rhs, *rest, **options)
        key = (lhs.type.name, type(rhs), rhs, math.copysign(1, rhs), rest)
        known = constants.get(key)
        if known is None:
            left, known = check_types(self, lhs, rhs, *rest)
            if left is not lhs:
                return left, known
            known.handle.data.flags.writeable = False
            constants[key] = known
        return lhs, known

    plain = {"int32", "int64", "fp32", "int1"}  # for which even a division computes in the same
    patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_values)
    patch.setattr(TritonSemantic, "cast", cast_unless_same)
    patch.setattr(TritonSemantic, "binary_op_type_checking_impl", check_different_types)


def _rewrite_equal_functions_once(patch: pytest.MonkeyPatch) -> None:
    """Kernels of many files have helpers of one text; a traceback names the first of the files."""
    rewrite = interpreter.FunctionRewriter.rewrite_ast
    codes: dict[str, Any] = {}

    @functools.cache
    def last_lines(path: str, changed: int) -> dict[int, Any]:
        """First line, a decorator's if there is one -> last line of each function in a file."""
        tree = ast.walk(ast.parse(Path(path).read_bytes()))
        functions = [node for node in tree if isinstance(node, ast.FunctionDef)]
        return {(*f.decorator_list, f)[0].lineno: f.end_lineno for f in functions}

    def rewrite_once(self: Any) -> Any:
        path, first = self.fn.__code__.co_filename, self.fn.__code__.co_firstlineno
        if not Path(path).is_file():
            return rewrite(self)
        linecache.checkcache(path)
        end = last_lines(path, Path(path).stat().st_mtime_ns)[first]
        lines = linecache.getlines(path)[first - 1 : end]
        self.def_lineno = self._find_def(lines)
        source = self._prepare_source(lines)
        if source not in codes:
            self.filename, self.def_file_lineno = path, first + self.def_lineno - 1
            codes[source] = compile(self._transform_ast(source), path, "exec")
        names = self.fn.__globals__
        for name, value in vars(interpreter).items():
            names.setdefault(name, value)
        made = dict(self.kwargs)
        exec(codes[source], names, made)
        return made[self.fn.__name__]

    patch.setattr(interpreter.FunctionRewriter, "rewrite_ast", rewrite_once)


def _skip_unreported_overflow_checks(patch: pytest.MonkeyPatch) -> None:
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", options)
