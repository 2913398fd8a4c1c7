"""What a generated package says of itself, and the command that builds it again from here."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nsagen.core.files import is_file
from nsagen.core.paths import specs_dir, working_folder
from nsagen.core.text import shell_text

MANIFEST = "manifest.json"

GENERATED = Path("generated")
"""Where packages are written unless a user says otherwise, below the working folder."""

_COMMAND = "# Regenerate: "


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """The manifest of a generated package; None where there is no such package, or none whole."""
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if is_file(path) else None
    except (OSError, ValueError, RecursionError):
        return None
    known = {"nsagen": str, "command": str, "files": dict, "variants": dict}
    is_own = isinstance(content, dict) and all(
        isinstance(content.get(key), kind) for key, kind in known.items()
    )
    return content if is_own else None


def is_built(folder: Path) -> bool:
    """Whether a build wrote a folder, even if its manifest is damaged or of a later version."""
    if read_manifest(folder) is not None:
        return True
    return (_command_in(folder / "__init__.py") or "").startswith("nsagen build ")


def spec_of(folder: Path) -> Path | None:
    """The file of the spec that a package was built from, wherever the working folder is.

    Returns:
        None where the package names no spec, or it isn't there.
    """
    manifest = read_manifest(folder) or {}
    command = manifest.get("command") or _command_in(folder / "__init__.py")
    if command is None:
        return None
    about = manifest.get("spec")
    recorded = about.get("path") if isinstance(about, Mapping) else None
    if isinstance(recorded, str):
        path = Path(os.path.normpath(os.path.join(os.path.realpath(folder), recorded)))
        return path if is_file(path) else None
    return spec_near(folder, _label_in(command))


def spec_near(folder: Path, label: str) -> Path | None:
    """The file that a spec's label means beside a package: a shipped one, or one of the project."""
    if "/" not in label and not Path(label).suffix:
        places = iter([specs_dir() / f"{label}.yaml"])
    else:
        places = (parent / label for parent in Path(os.path.realpath(folder)).parents)
    return next((Path(os.path.normpath(path)) for path in places if is_file(path)), None)


def recorded_path(folder: Path, label: str, source: Path) -> str | None:
    """What a package's manifest must say about the place of its spec, relative to the package.

    None where the label is enough: then a package says nothing about the machine.
    """
    near = spec_near(folder, label)
    if near is not None and os.path.exists(source) and near.samefile(source):
        return None
    # realpath, as Path.resolve raises RuntimeError for links in a circle.
    return Path(os.path.relpath(os.path.realpath(source), os.path.realpath(folder))).as_posix()


def build_command(spec: str, out: Path, tuned: Path | None = None) -> str:
    """What to type into a shell in the working folder to build a spec below `out`."""
    words = ["nsagen", "build", as_argument(spec)]
    if out.absolute() != GENERATED.absolute():
        words += ["--out", str(out)]
    if tuned is not None:
        words += ["--tuned", str(tuned)]
    return shell_text(words)


def as_argument(path: str) -> str:
    """A path that the command line does not take for an option."""
    return f"./{path}" if path.startswith("-") else path


def from_here(path: Path) -> str:
    """A path as the shortest text that means it in the working folder; from /, as it is."""
    here = working_folder()
    is_below = path.is_relative_to(here) and here != here.parent
    return str(path.relative_to(here) if is_below else path)


def remedy(name: str, folder: Path | None = None) -> str:
    """The end of an error: how to build a missing package, or the damaged one in `folder`."""
    if folder is not None:
        spec = spec_of(folder)
        if spec is not None:
            return f"run: {build_command(from_here(spec), folder.absolute().parent)}"
        return f"give nsagen build the path of its spec, which {folder} does not know, and --out"
    for path in _specs_above(name):
        return f"run: {build_command(from_here(path), GENERATED)}"
    if is_file(specs_dir() / f"{name}.yaml"):
        return f"run: {build_command(name, GENERATED)}"
    return f"give nsagen build the path of its spec: no {name}.yaml is in ./specs or shipped"


def _specs_above(name: str) -> Iterator[Path]:
    here = working_folder()
    paths = (folder / "specs" / f"{name}.yaml" for folder in (here, *here.parents))
    return (path for path in paths if is_file(path))


def _command_in(path: Path) -> str | None:
    """The command in a generated file's header."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[
            :4
        ]  # a conflict of branches may begin there
    except (OSError, ValueError):
        return None
    found = [line.removeprefix(_COMMAND) for line in lines if line.startswith(_COMMAND)]
    return found[0] if found else None


def _label_in(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # of a version that did not quote
        words = command.split(" ")
    return " ".join(words[2:])
