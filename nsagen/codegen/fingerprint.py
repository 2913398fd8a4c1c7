"""A kernel's fingerprint: what of its source can change its speed or its results.

A measured time stays true as long as the kernel's code stays the same, whatever else happens
to the template, the schedule space beside it, or a knob's values. So comments, docstrings,
error texts and the kernel's own name (which carries a hash of the template) are left out.
"""

from __future__ import annotations

import ast
import hashlib

from nsagen.codegen.template import kernel_name, render
from nsagen.core.workload import Schedule, Workload


def kernel_fingerprint(workload: Workload, schedule: Schedule) -> str:
    """16 hex digits over the code that the workload and schedule render to.

    Raises:
        BuildError: the template cannot be rendered.
        UnsupportedWorkloadError: no algorithm of the schedule's name covers the workload.
    """
    source = render(workload, schedule, header="")
    return source_fingerprint(source, kernel_name(workload, schedule))


def source_fingerprint(source: str, name: str) -> str:
    """16 hex digits over Python code, with `name` made anonymous; the same in every Python."""
    parts: list[str] = []
    _note(ast.parse(source.replace(name, "kernel")), parts)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _note(node: object, parts: list[str]) -> None:
    """Add the syntax tree as text, without what does not run and what only newer Pythons note."""
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
