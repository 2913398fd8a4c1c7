"""How kernels find a tile's sequence: each search beside a walk over all sequences.

The templates' own text runs as plain Python, with functions of NumPy in the place of Triton's:
the pipelines' searches are Gluon, which the interpreter does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nsagen.codegen.template import environment

COUNTS = (1, 2, 31, 32, 33, 44, 45, 63, 64, 65, 127, 1025)
TILES = (1, 8, 64, 128)


class Number(np.ndarray):
    """An int32 number or vector with Triton's `to`."""

    def to(self, dtype: type) -> Number:
        return self.astype(dtype).view(Number)


def number(x: Any) -> Number:
    return np.asarray(x, dtype=np.int32).view(Number)


class Pointer:
    """Of a one-dimensional tensor. A load of what is not there fails, unless it is masked."""

    def __init__(self, data: np.ndarray, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)


def load(pointer: Pointer, mask: Any = True, other: int = 0) -> Number:
    at = np.where(mask, pointer.at, 0)
    assert ((at >= 0) & (at < len(pointer.data))).all(), "reads past cu_seqlens"
    return number(np.where(mask, pointer.data[at], other))


LANGUAGE = SimpleNamespace(
    load=load,
    arange=lambda first, end, layout=None: number(np.arange(first, end)),
    sum=lambda x, axis: number(x.sum()),
    where=lambda mask, a, b: number(np.where(mask, a, b)),
    minimum=lambda a, b: number(np.minimum(a, b)),
    maximum=lambda a, b: number(np.maximum(a, b)),
    BlockedLayout=lambda *arguments: None,
    int32=np.int32,
    constexpr=int,
)


def functions_of(template: str) -> SimpleNamespace:
    """The functions of a shared template."""
    source = environment().get_template(f"shared/{template}").render()
    jit = SimpleNamespace(jit=lambda function: function)
    names: dict[str, Any] = {"tl": LANGUAGE, "gl": LANGUAGE, "triton": jit, "gluon": jit}
    exec(compile(source, template, "exec"), names)
    return SimpleNamespace(**names)


def lengths_of(count: int) -> np.ndarray:
    """Empty sequences at both ends and between, short ones, and some of several tiles."""
    lengths = np.random.default_rng(count).choice([0, 1, 2, 7, 8, 9, 64, 130], count)
    lengths[:: max(1, count - 1)] = 0 if count > 2 else 5
    return lengths


def walked(lengths: np.ndarray, tile: int, rows: int = 1) -> dict[int, tuple[int, int]]:
    """The (sequence, tile in it) of each number that stands for a tile."""
    found: dict[int, tuple[int, int]] = {}
    begin = 0
    for seq, length in enumerate(lengths):
        first = begin * rows // tile + seq
        for i in range(-(-length * rows // tile)):
            assert first + i not in found
            found[first + i] = (seq, i)
        begin += length
    return found


def offsets(lengths: np.ndarray) -> Pointer:
    return Pointer(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


@pytest.mark.parametrize("count", COUNTS)
def test_the_search_of_plain_kernels(count: int) -> None:
    find_tile = functions_of("sequences.py.j2").find_tile
    lengths = lengths_of(count)
    for tile, rows in zip(TILES, (1, 3, 16, 2), strict=True):
        known = walked(lengths, tile, rows)
        programs = -(-int(lengths.sum()) * rows // tile) + count
        for n in range(0, programs, max(1, programs // 150)):
            seq, at = find_tile(offsets(lengths), count, n, tile, rows)
            assert (int(seq), int(at)) == known[n] if n in known else seq == count, (tile, n)


@pytest.mark.parametrize("count", COUNTS)
def test_the_search_for_a_token(count: int) -> None:
    find_sequence = functions_of("sequences.py.j2").find_sequence
    lengths = lengths_of(count)
    total = int(lengths.sum())
    owner = np.repeat(np.arange(count), lengths)
    for token in range(0, total + 1, max(1, total // 150)):
        expected = owner[token] if token < total else count
        assert find_sequence(offsets(lengths), count, token) == expected


def from_the_first(find_keys: Callable[..., Any]) -> Callable[..., Any]:
    return lambda cu, batch, seq, n, tile: find_keys(cu, batch, n, tile)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("search", ["tile_of_number", "find_keys"])
def test_the_searches_of_pipelines(search: str, count: int) -> None:
    """A program takes every 132nd number and searches on from the last sequence."""
    find = getattr(functions_of(f"{search}.py.j2"), search)
    if search == "find_keys":
        find = from_the_first(find)
    lengths = lengths_of(count)
    begins = np.concatenate([[0], lengths.cumsum()])
    for tile in TILES:
        known = walked(lengths, tile)
        numbers = -(-int(lengths.sum()) // tile) + count
        for program, programs in ((0, 1), (5, 132)):
            step = programs * max(1, numbers // programs // 150)
            seq: Any = 0
            for n in range(program, numbers, step):
                seq, at, begin, length = find(offsets(lengths), count, seq, n, tile)
                assert (begin, length) == (begins[seq], lengths[seq])
                if n in known:
                    assert (int(seq), int(at)) == known[n]
                else:
                    assert at * tile >= length, "a number of no tile lies past its sequence"
