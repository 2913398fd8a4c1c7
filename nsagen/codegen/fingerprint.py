"""A kernel's fingerprint: the part of its source that can change its speed or its results.

A kernel's name, tuning records and compiled resources all stay valid as long as its code stays
the same, whatever else changes in the template, the schedule space beside it, or a knob's values.
So the fingerprint omits comments, docstrings, error texts and the kernel's own name.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterable

_BETWEEN_STATEMENTS = re.compile(r"\n\n\n(?=\S)")
"""Two blank lines, as templates put around functions."""


def source_fingerprint(source: str, name: str) -> str:
    """16 hex digits over Python code, with `name` made anonymous; the same in every Python.

    Raises:
        SyntaxError: the source is not Python.
    """
    anonymous = source.replace(name, "kernel")
    try:
        parts = [_code(part) for part in _BETWEEN_STATEMENTS.split(anonymous)]
    except SyntaxError:  # a text may have blank lines, too
        parts = [_code(anonymous)]
    return _digest(("Module", ".body", *filter(None, parts), "end"))


def code_fingerprint(source: str) -> str:
    """16 hex digits over a module's code, wherever its imports come from."""
    parts: list[str] = []
    body = ast.parse(source).body
    _note([node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)], parts)
    return _digest(parts)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=512)  # most kernels of a template share most of their functions
def _code(source: str) -> str:
    """A source's statements, as text that says what they do."""
    parts: list[str] = []
    _note(ast.parse(source).body, parts)
    return "\n".join(parts)


def _note(node: object, parts: list[str]) -> None:
    """Add the syntax tree as text, without what does not run and what only newer Pythons record."""
    if isinstance(node, ast.Raise) or _is_docstring(node):
        return
    if isinstance(node, list):
        for item in node:
            _note(item, parts)
    elif isinstance(node, ast.AST):
        parts.append(type(node).__name__)
        for field, value in ast.iter_fields(node):
            if value is not None and value != [] and field not in ("ctx", "kind", "type_comment"):
                parts.append(f".{field}")
                _note(value, parts)
        parts.append("end")
    else:
        parts.append(repr(node))


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
