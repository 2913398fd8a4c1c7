"""Imports run one way, down the floors of the package, and nowhere in a circle.

Imports inside functions and for type checkers count too.
"""

from __future__ import annotations

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nsagen"

FLOORS = (
    "core",
    "spec",
    "records",
    "codegen",
    "export",
    "runtime",
    "ops",
    "cases",
    "model",
    "aot",
    "tune",
    "distributed",
    "integrations",
    "serve",
    "estimate",
    "reports",
    "bench",
    "cli",
)
"""The folders, from the ground up: a file imports from its own floor and from those below it."""

RUNNING = {"runtime", "ops", "model", "distributed", "integrations", "serve"}
"""What a model imports. It must not need what makes kernels, except through the door below."""

GENERATING = {"spec", "records", "codegen", "export"}

DOOR = ("nsagen.runtime.user_cache", "nsagen.codegen.build")
"""Where the dispatcher has a kernel built that no package has, imported when that happens."""

TOP = {"nsagen", "nsagen.__main__", "nsagen.errors"}
"""`nsagen.load` imports the running side when it is called; `__main__` is the command line;
`errors` is the name that callers import exceptions by."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: str, *, lazily: bool = True) -> set[str]:
    """The package's modules that a module imports; without `lazily`, those it imports at once."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set[str]()
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return {name for name in found if name in MODULES and name != module}


@functools.cache
def graph() -> dict[str, set[str]]:
    """The package's modules that each one imports."""
    return {module: imported(module) for module in MODULES}


def floor_of(module: str) -> str:
    return module.split(".")[1]


def test_every_file_is_on_a_floor() -> None:
    loose = {module for module in set(MODULES) - TOP if floor_of(module) not in FLOORS}
    assert not loose
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
    }


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_down(floor: str) -> None:
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    wrong = [
        f"{module} imports {other}"
        for module in sorted(set(MODULES) - TOP)
        if floor_of(module) == floor
        for other in sorted(graph()[module] - {"nsagen"})
        if floor_of(other) not in allowed
    ]
    assert not wrong, f"a file imports its own floor and those below it: {wrong}"


def test_the_running_side_reaches_the_generating_side_by_one_door() -> None:
    crossings = [
        (module, other)
        for module in sorted(set(MODULES) - TOP)
        if floor_of(module) in RUNNING
        for other in sorted(graph()[module] - TOP)
        if floor_of(other) in GENERATING
    ]
    assert crossings == [DOOR]
    assert DOOR[1] not in imported(DOOR[0], lazily=False), "the door opens only on a miss"


def test_there_is_no_circle() -> None:
    inside = {module: graph()[module] - TOP for module in set(MODULES) - TOP}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_contributing_tells_these_floors() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    section = text.partition("\n## Floors\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert tuple(re.findall(r"`(\w+)/`", "".join(rows))) == FLOORS
    sides = re.findall(r"side\s+\((.*?)\)", section)
    assert [set(re.findall(r"`(\w+)`", side)) for side in sides] == [RUNNING, GENERATING]
