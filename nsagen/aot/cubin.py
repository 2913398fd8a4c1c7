"""What NVIDIA's binaries state about themselves, read from the file.

A cubin is an ELF file. Its section .nv.info is a list of attributes. Two of them hold what a
disassembler would print; reading them is a thousand times faster than starting one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from nsagen.core.errors import BuildError

_REGISTERS, _STACK = 0x2F, 0x11
"""Attributes EIATTR_REGCOUNT and EIATTR_FRAME_SIZE: (symbol, value), one per function."""

_SIZED = 4
"""Format of an attribute whose data follow its size; others have their value there instead."""


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread of the cubin function that uses most.

    Raises:
        BuildError: not a cubin.
    """
    try:
        rows = [(attribute, *struct.unpack("<II", data)) for attribute, data in _info(cubin)]
        registers = max(value for attribute, _, value in rows if attribute == _REGISTERS)
        stack = max((value for attribute, _, value in rows if attribute == _STACK), default=0)
    except (struct.error, ValueError, IndexError) as error:
        raise BuildError(
            f"resources: the binary must be a cubin; got {len(cubin)} bytes that are none ({error})"
        ) from None
    return registers, stack


def _info(cubin: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of pairs in the section .nv.info."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * n) for n in range(count)]
    for section in sections:
        name = sections[names][4] + section[0]
        if cubin[name : cubin.index(b"\0", name)] != b".nv.info":
            continue
        at, end = section[4], section[4] + section[5]
        while at < end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == _SIZED:
                if attribute in (_REGISTERS, _STACK):
                    yield attribute, cubin[at : at + length]
                at += length
