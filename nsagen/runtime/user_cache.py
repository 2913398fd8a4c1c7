"""The user cache: kernels that no package had, built when a call needed them.

    <root>/<nsagen version>-<hash of what generates>/<target>-triton-<release>/<variant>.py

Files appear whole or not at all and never change afterwards, so processes share the
folder without locks. A new version, or an edit of the generating code, starts a new folder. A
file that a crash or an edit damaged is built again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import time
from pathlib import Path
from types import ModuleType

from nsagen.core.errors import NsagenError, UnsupportedWorkloadError
from nsagen.core.files import is_whole
from nsagen.core.importing import LOCK, import_once
from nsagen.core.paths import cache_dir, templates_dir, visible
from nsagen.core.releases import installed_release
from nsagen.core.version import __version__
from nsagen.core.workload import DTYPES, Workload
from nsagen.runtime.missing import unsupported

_CODEGEN = Path(__file__).parents[1] / "codegen"

_log = logging.getLogger("nsagen.runtime")


def cache_folder() -> Path:
    """The folder of the kernels that this version generates; it may not exist yet."""
    return cache_dir() / f"{__version__}-{_generator_hash()}"


def cached_variant(workload: Workload, target: str, who: str) -> Path:
    """The kernel file of a workload with the target's default schedule, built if needed.

    Logs one line when it builds; a hit imports nothing of the generating side.

    Args:
        target: as devices name it; one without recorded limits uses its predecessor's.
        who: the dispatcher's name, for log and error texts.

    Raises:
        UnsupportedWorkloadError: no template covers the workload, or it cannot be built here.
    """
    with LOCK:  # if several threads miss one kernel, one builds it
        return _cached_variant(workload, target, who)


def _cached_variant(workload: Workload, target: str, who: str) -> Path:
    built_for = _known_target(workload, target, who)
    release = ".".join(map(str, installed_release() or ("unknown",)))  # not all run each algorithm
    folder = cache_folder() / f"{target.replace(':', '-')}-triton-{release}"
    label = f"{workload.op}_{workload.pass_}__{workload.label}__"
    for path in sorted(folder.glob(f"{label}*.py")):
        if len(path.stem) == len(label) + 8:  # the rest of a variant's name is its hash
            if is_whole(path):
                return path
            _log.warning("%s: %s is damaged and will be built again", who, path)
    start = time.perf_counter()
    try:
        from nsagen.codegen.build import build_variant

        folder.mkdir(parents=True, exist_ok=True)
        path = build_variant(workload, built_for, folder)
    except OSError as error:
        raise UnsupportedWorkloadError(
            f"dispatcher {who}: {workload} on {target} is in no package, and building it failed: "
            f"must be able to write {folder}; got {error.strerror or error}; "
            "set NSAGEN_CACHE_DIR to a folder that can be written"
        ) from error
    except (ImportError, NsagenError) as error:
        raise unsupported(workload, target, who, f"building it failed: {error}") from error
    _log.warning(
        "%s: %s for %s was in no package; built %s in %.1f s with a default, untuned schedule",
        who,
        workload,
        target,
        path,
        time.perf_counter() - start,
    )
    return path


@functools.cache
def can_build(workload: Workload, target: str) -> bool:
    """Whether an algorithm is preferred for a workload on a target, with the installed Triton."""
    from nsagen.codegen.build import is_offered_here
    from nsagen.core.target import parse_target

    try:
        built_for = parse_target(_known_target(workload, target, "can_build"))
    except UnsupportedWorkloadError:
        return False
    return is_offered_here(workload, built_for)


def load_kernel(path: Path) -> ModuleType:
    """Import a kernel file from the cache.

    Raises:
        BuildError: the file is not a kernel.
    """
    folder = re.sub(r"\W", "_", path.parent.name)
    return import_once(path, f"nsagen_cached_{folder}_")


@functools.cache
def _generator_hash() -> str:
    """8 hex digits over every template and schedule space, and the code that renders them.

    It hashes text, unlike a kernel's fingerprint: a hit must not have to render anything.
    """
    digest = hashlib.sha256()
    for root in (templates_dir(), _CODEGEN):
        for path in visible([*root.rglob("*.j2"), *root.rglob("*.py")]):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _known_target(workload: Workload, target: str, who: str) -> str:
    """The target itself or, for a newer GPU than any known, the nearest older one."""
    from nsagen.core.target import KNOWN_TARGETS

    if workload.dtype not in DTYPES:
        raise unsupported(workload, target, who, f"dtypes are {', '.join(DTYPES)}")
    if target in KNOWN_TARGETS:
        return target
    backend, _, arch = target.partition(":")
    if arch.isdigit():
        older = [
            int(known.arch)
            for known in KNOWN_TARGETS.values()
            if known.backend == backend and known.arch.isdigit() and int(known.arch) < int(arch)
        ]
        if older:
            return f"{backend}:{max(older)}"
    raise UnsupportedWorkloadError(
        f"dispatcher {who}: {workload} needs a known target; got {target}; "
        f"known: {', '.join(KNOWN_TARGETS)}"
    )
