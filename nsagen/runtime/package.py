"""`nsagen.load`: find a generated package and hand out its dispatcher."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from nsagen.core.errors import InvalidInputError
from nsagen.runtime.dispatcher import Dispatcher, OnMissing

_PREFIX = "_nsagen_generated_"
"""Of the names of packages that were imported from a folder."""


def load(name: str, on_missing: OnMissing = "build") -> Dispatcher:
    """The dispatcher of the package `generated.<name>`.

    Looks for it on `sys.path`, then in `generated/` of the working folder, then in
    `generated/` of the user cache.

    Args:
        name: of the spec, e.g. "llama8b".
        on_missing: "build" builds what a call needs and the package lacks; "error" raises
            `UnsupportedWorkloadError`.

    Raises:
        InvalidInputError: the name is no spec's, or no such package is found.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InvalidInputError(
            f"nsagen.load: a name must be lower-case letters, digits and _; got {name!r}; "
            "give the spec's name, not its path"
        )
    try:
        dispatcher = getattr(_package(name), "dispatcher", None)
    except ModuleNotFoundError as error:
        if error.name not in (f"generated.{name}.dispatcher", f"{_PREFIX}{name}.dispatcher"):
            raise
        dispatcher = None
    if not isinstance(dispatcher, Dispatcher):  # a build that was cut short wrote only kernels
        raise InvalidInputError(
            f"nsagen.load: a package must be whole; generated.{name} has no dispatcher; "
            f"run: nsagen build specs/{name}.yaml"
        )
    return dispatcher.with_on_missing(on_missing)


def _package(name: str) -> ModuleType:
    qualified = f"generated.{name}"
    try:
        return importlib.import_module(qualified)
    except ModuleNotFoundError as error:
        if error.name not in ("generated", qualified):
            raise
    from nsagen.runtime.user_cache import cache_dir

    folders = (Path.cwd() / "generated" / name, cache_dir() / "generated" / name)
    for folder in folders:
        if (folder / "__init__.py").is_file():
            return import_folder(name, folder)
    places = ", ".join(str(folder) for folder in folders)
    raise InvalidInputError(
        f"nsagen.load: a spec's package must be built first; found no package {qualified} "
        f"on sys.path, nor {places}; run: nsagen build specs/{name}.yaml"
    )


def import_folder(name: str, folder: Path) -> ModuleType:
    """Import a package from a folder whose parent is not on `sys.path`."""
    qualified = f"{_PREFIX}{name}"
    known = sys.modules.get(qualified)
    if known is not None and Path(known.__file__ or "").parent == folder:
        return known
    module_spec = importlib.util.spec_from_file_location(
        qualified, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert module_spec is not None
    assert module_spec.loader is not None
    stale = [m for m in sys.modules if m == qualified or m.startswith(f"{qualified}.")]
    for module_name in stale:
        del sys.modules[module_name]
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[qualified] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[qualified]
        raise
    return module
