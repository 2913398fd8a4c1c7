"""`nsagen.load`: finds a generated package and returns its dispatcher."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from nsagen.core.errors import InvalidInputError
from nsagen.core.files import is_file
from nsagen.core.importing import import_once
from nsagen.core.packages import remedy
from nsagen.core.paths import cache_dir, project_roots, working_folder
from nsagen.runtime.dispatcher import Dispatcher, OnMissing

_log = logging.getLogger("nsagen.runtime")

_PREFIX = "_nsagen_generated_"
"""Prefix of the names of packages that were imported from a folder."""


def load(name: str, on_missing: OnMissing = "build") -> Dispatcher:
    """The dispatcher of the package `generated.<name>`.

    Looks for it on `sys.path`, then in `generated/` of the working folder and of the projects
    around it, then in `generated/` of the user cache. A package of the working folder or its
    project goes before nsagen's own.

    Args:
        name: of the spec, e.g. "llama8b".
        on_missing: "build" builds what a call needs and the package lacks; "error" raises
            `UnsupportedWorkloadError`.

    Raises:
        InvalidInputError: the name is not a spec's name, or the package was not found or is
            damaged.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InvalidInputError(
            f"nsagen.load: a name must be lower-case letters, digits and _; got {name!r}; "
            "give the spec's name, not its path"
        )
    try:
        dispatcher = getattr(_package(name), "dispatcher", None)
    except ModuleNotFoundError as error:
        if not re.fullmatch(rf"(generated\.|{_PREFIX}\w+_){name}\.dispatcher", error.name or ""):
            raise
        dispatcher = None
    except SyntaxError as error:  # such as the marks of a merge conflict
        raise InvalidInputError(
            f"nsagen.load: a package must be as it was built; got {error} in {error.filename}; "
            f"{remedy(name, _folder_of(name))}"
        ) from error
    if not isinstance(dispatcher, Dispatcher):  # an interrupted build wrote only kernels
        raise InvalidInputError(
            f"nsagen.load: a package must be whole; generated.{name} has no dispatcher; "
            f"{remedy(name, _folder_of(name))}"
        )
    return dispatcher.with_on_missing(on_missing)


def _package(name: str) -> ModuleType:
    qualified = f"generated.{name}"
    found = _on_path(name)
    try:
        module = importlib.import_module(qualified)
    except ModuleNotFoundError as error:
        if error.name not in ("generated", qualified):
            raise
    else:
        # One of the same name may have been imported from a folder that was on the path then.
        own = next((path for path in _of_project(name) if is_file(path / "__init__.py")), None)
        if own is not None and _is_of_nsagen(module, name):
            if _is_of(module, own):
                return module
            owner = "the working folder"
            if own != working_folder() / "generated" / name:
                owner += "'s project"
            _log.info("nsagen.load: %s of %s, not nsagen's own package", own, owner)
            return import_folder(own)
        if found is not None and not _is_of(module, found):
            return import_folder(found)
        return module
    folders = _folders(name)
    for folder in folders:
        if is_file(folder / "__init__.py"):
            return import_folder(folder)
    places = ", ".join(str(folder) for folder in folders)
    raise InvalidInputError(
        f"nsagen.load: a spec's package must be built first; found no package {qualified} "
        f"on sys.path, nor {places}; {remedy(name)}"
    )


def _folders(name: str) -> tuple[Path, ...]:
    """Where a package may be that is not on `sys.path`."""
    return *_of_project(name), cache_dir() / "generated" / name


def _of_project(name: str) -> tuple[Path, ...]:
    """Where a package of the user's may be: in the working folder, or a project's root above."""
    here = working_folder()
    return tuple(
        dict.fromkeys(root / "generated" / name for root in (here, *project_roots(here / name)))
    )


def _folder_of(name: str) -> Path | None:
    """The folder of a package that is there, whole or not."""
    found = _on_path(name)
    return found or next((path for path in _folders(name) if os.path.isdir(path)), None)


def _on_path(name: str) -> Path | None:
    """The folder of a package on `sys.path`, which may include the working folder."""
    for entry in sys.path:
        folder = Path(entry, "generated", name)
        if is_file(folder / "__init__.py"):
            return folder
    return None


def _is_of_nsagen(module: ModuleType, name: str) -> bool:
    """Whether a package lies beside nsagen's own code: a checkout has one for each spec."""
    return _is_of(module, Path(__file__).parents[2] / "generated" / name)


def _is_of(module: ModuleType, folder: Path) -> bool:
    return Path(module.__file__ or "").resolve().parent == folder.resolve()


def import_folder(folder: Path) -> ModuleType:
    """Import a package from a folder whose parent is not on `sys.path`, once a process."""
    return import_once(folder / "__init__.py", _PREFIX)
