"""Which compiler this environment makes of Triton: its version, and the settings that count."""

from __future__ import annotations

import hashlib
import os

from nsagen.core.installed import triton_version

_WITHOUT_EFFECT = (
    "TRITON_ALWAYS_COMPILE",
    "TRITON_BACKENDS_IN_TREE",
    "TRITON_CACHE_",
    "TRITON_CUPTI_",
    "TRITON_DUMP_",
    "TRITON_HOME",
    "TRITON_INTERPRET",
    "TRITON_KERNEL_DUMP",
    "TRITON_LIBCUDA_PATH",
    "TRITON_PRINT_",
    "TRITON_PROTON_",
    "TRITON_REMOTE_CACHE_",
    "TRITON_REPRODUCER_PATH",
    "TRITON_STORE_BINARY_ONLY",
)
"""Beginnings of settings that say where files are or what is shown, or that workers never see."""


def compiler_settings() -> dict[str, str]:
    """The environment's settings that may change what Triton compiles; imports Triton.

    They are those that Triton lists, and all others with its name except those known to have no
    effect: it puts some, such as TRITON_DEBUG, into its own keys in another way.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars

    own = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("TRITON_") and not name.startswith(_WITHOUT_EFFECT)
    }
    return dict(sorted({**own, **get_cache_invalidating_env_vars()}.items()))


def compiler_name() -> str:
    """Triton's version with those settings, such as "3.9.0 with DISABLE_LLVM_OPT=true".

    Paths are shown as a hash: they are of this machine.
    """
    version = triton_version()
    if version is None:
        return "unknown"
    settings = [f"{name}={_shown(value)}" for name, value in compiler_settings().items()]
    return f"{version} with {' '.join(settings)}" if settings else version


def _shown(value: str) -> str:
    is_plain = value.isascii() and value.isprintable() and not set(value) & set("/ \\~")
    return value if is_plain else hashlib.sha256(os.fsencode(value)).hexdigest()[:8]
