"""The part of nsagen that an exported package needs: its own files, with relative imports.

What the ops import comes along, at any depth. Three modules lead back to what builds packages;
stand-ins from `templates/export` take their places, which refuse what an export cannot do.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

from nsagen.core.errors import BuildError

STAND_INS = {
    "nsagen.core.packages": "packages",
    "nsagen.runtime.package": "load",
    "nsagen.runtime.user_cache": "user_cache",
}
"""Modules of the export that are not nsagen's own -> their templates."""

NAMESPACE = "nsagen.ops._namespace"
"""Says where PyTorch finds the ops; each export writes its own."""

_ROOT = Path(__file__).resolve().parents[1]


def needed_modules(roots: Iterable[str]) -> tuple[str, ...]:
    """The modules of nsagen that some modules import, themselves included, sorted.

    A package's own `__init__` is among them only if something imports from it.
    """
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            if module not in STAND_INS:
                waiting += _imported(module)
    return tuple(sorted(found))


def relative_path(module: str) -> str:
    """Where a module is in the package, e.g. "ops/rope.py"."""
    return _file(module).relative_to(_ROOT).as_posix()


def source_of(module: str) -> str:
    """A module's text, with relative imports."""
    return with_relative_imports(_file(module).read_text(encoding="utf-8"), module)


def with_relative_imports(text: str, module: str) -> str:
    """A text whose imports of nsagen are relative, as in a package of any name.

    Args:
        module: the text's place, e.g. "nsagen.ops.rope"; "nsagen.x" for one at the top.

    Raises:
        BuildError: an import that has no relative form.
    """
    is_package = _is_package(module)
    package = module.split(".")[1:] if is_package else module.split(".")[1:-1]
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(n.name.startswith("nsagen") for n in node.names):
            raise BuildError(
                f"export: {module} must import names from nsagen's modules; got "
                f"{ast.unparse(node)!r} in line {node.lineno}; write from ... import ..."
            )
        if isinstance(node, ast.ImportFrom) and _is_own(node):
            target = str(node.module).split(".")[1:]
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(
                f"from {node.module} import", f"from {_relative(package, target)} import", 1
            )
    return "".join(lines)


def names_in_all(module: str) -> tuple[str, ...]:
    """What a module's `__all__` lists."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(ast.literal_eval(node.value))
    raise BuildError(f"export: {module} must have __all__; got none; add it")


def _relative(package: list[str], target: list[str]) -> str:
    shared = 0
    while shared < min(len(package), len(target)) and package[shared] == target[shared]:
        shared += 1
    return "." * (len(package) - shared + 1) + ".".join(target[shared:])


def _imported(module: str) -> Iterator[str]:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and _is_own(node):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if _exists(name)]
            yield from modules
            if len(modules) < len(names) or _shadows(str(node.module), node):
                yield str(node.module)


def _shadows(package: str, node: ast.ImportFrom) -> bool:
    """Whether a package's `__init__` defines one of the names, though a module has it too."""
    return any(alias.name in _defined(package) for alias in node.names)


@functools.cache
def _defined(module: str) -> frozenset[str]:
    names = [n for n in ast.walk(_tree(module)) if isinstance(n, ast.ImportFrom)]
    return frozenset(a.asname or a.name for n in names for a in n.names)


def _is_own(node: ast.ImportFrom) -> bool:
    return node.level == 0 and str(node.module).split(".")[0] == "nsagen"


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    path = _ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _exists(module: str) -> bool:
    return _file(module).is_file()


def _is_package(module: str) -> bool:
    return _file(module).name == "__init__.py"
