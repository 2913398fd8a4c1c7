"""Which compiler this environment makes of Triton: its version, and the settings that count."""

from __future__ import annotations

import functools
import hashlib
import os
import stat

from nsagen.core.installed import triton_version

IN_ITS_PLACE = (
    "TRITON_INTERPRET",
    "TRITON_KERNEL_OVERRIDE",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_OVERRIDE_DIR",
)
"""Settings that put something else in place of the kernel or the target that a worker is given.

Workers do not see them. All others that change what is compiled are part of the compiler's name.
"""

_WITHOUT_EFFECT = (
    "CC",
    "TRITON_ALWAYS_COMPILE",
    "TRITON_BACKENDS_IN_TREE",
    "TRITON_CACHE_",
    "TRITON_CUPTI_",
    "TRITON_DUMP_",
    "TRITON_HOME",
    "TRITON_KERNEL_DUMP",
    "TRITON_LIBCUDA_PATH",
    "TRITON_PRINT_",
    "TRITON_PROTON_",
    "TRITON_REMOTE_CACHE_",
    "TRITON_REPRODUCER_PATH",
    "TRITON_STORE_BINARY_ONLY",
)
"""Beginnings of settings that say where files are or what is shown."""


def compiler_settings() -> dict[str, str]:
    """The environment's settings that may change what Triton compiles; imports Triton.

    They are those that Triton lists, and all others with its name or that it reads, except those
    known to have no effect: it puts some, such as TRITON_DEBUG, into its own keys in another way,
    and forgets others, such as PTXAS_OPTIONS.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars

    read = _read_by_triton()
    own = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith("TRITON_") or name in read) and not name.startswith(_WITHOUT_EFFECT)
    }
    found = {**own, **get_cache_invalidating_env_vars()}
    return {name: found[name] for name in sorted(found) if name not in IN_ITS_PLACE}


@functools.cache
def _read_by_triton() -> frozenset[str]:
    """The variables that Triton's Python reads, whatever their names."""
    from triton import knobs

    groups = [one for one in vars(knobs).values() if isinstance(one, knobs.base_knobs)]
    return frozenset(knob.key for group in groups for knob in group.knob_descriptors.values())


def compiler_name() -> str:
    """Triton's version with those settings, such as "3.9.0 with DISABLE_LLVM_OPT=true".

    Paths are shown as a hash: of the content of files, or of the path, which is of this machine.
    """
    version = triton_version()
    if version is None:
        return "unknown"
    settings = [f"{name}={_shown(value)}" for name, value in compiler_settings().items()]
    return f"{version} with {' '.join(settings)}" if settings else version


def _shown(value: str) -> str:
    is_plain = value.isascii() and value.isprintable() and not set(value) & set("/ \\~")
    if is_plain:
        return value
    parts = b"".join(_content(path) or os.fsencode(path) for path in value.split(os.pathsep))
    return hashlib.sha256(parts).hexdigest()[:8]


def _content(path: str) -> bytes:
    """The hash of a file, such as another ptxas; empty where no file is."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return b""
        return _hash(path, found.st_mtime_ns, found.st_size)
    except (OSError, ValueError):
        return b""


@functools.lru_cache(maxsize=16)
def _hash(path: str, time_ns: int, size: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
