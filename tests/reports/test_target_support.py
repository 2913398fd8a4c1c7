"""Shipped defaults compile for every target and fit it; the documentation says what they use."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsagen.codegen.template import space_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.reports.support_page import page
from nsagen.reports.target_support import (
    Usage,
    Variant,
    listed,
    measure,
    problems,
    read,
    shipped,
    usage_of,
    variants,
    write,
)
from nsagen.spec import load_spec, shipped_specs

PATH = Path(__file__).parents[2] / "docs" / "support.json"
TABLE = read(PATH)


@pytest.fixture(scope="module")
def every() -> list[Variant]:
    return variants(shipped())


@pytest.fixture(scope="module")
def some() -> list[Variant]:
    return variants(listed())


def test_the_table_has_todays_kernels(every: list[Variant]) -> None:
    """A name covers its template and schedule. Else: python docs/generate.py --support."""
    assert set(TABLE) == {(variant.name, variant.target) for variant in every}


def test_every_default_compiles_fits_and_spills_in_no_loop(every: list[Variant]) -> None:
    assert list(problems(TABLE, every)) == []


def test_no_default_takes_more_shared_memory_than_its_space_says(every: list[Variant]) -> None:
    """So a build refuses what cannot launch."""
    more = []
    for variant in every:
        space = space_for(variant.workload, variant.schedule.algorithm)
        target = KNOWN_TARGETS[variant.target]
        most = space.memory_on(variant.workload, variant.schedule, target)
        used = TABLE[variant.name, variant.target].shared_bytes
        if used > most:
            more.append(f"{variant}: {used} of {most} bytes; {variant.schedule}")
    assert more == []


def test_what_does_not_compile_fit_or_spills_is_said(some: list[Variant], tmp_path: Path) -> None:
    one, two = some[:2]
    table = {
        (one.name, one.target): Usage(255, 40, 1 << 18, "wgmma", 3, triton="3.6.0"),
        (two.name, two.target): Usage(0, 0, 0, "", 0, "no ptxas", "3.9.0"),
    }
    texts = list(problems(table, (one, two)))
    limit = KNOWN_TARGETS[one.target].shared_memory
    assert texts == [
        f"{one}: loads or stores the stack 3 times in loops; {one.schedule}",
        f"{one}: needs 262144 of {limit} bytes; {one.schedule}",
        f"{two}: no ptxas",
    ]
    write(tmp_path / "table.json", table)
    assert read(tmp_path / "table.json") == table


def test_the_page_counts_kernels_and_those_that_spill(some: list[Variant]) -> None:
    heavy = {(v.name, v.target): TABLE[v.name, v.target]._replace(loop_spills=9) for v in some}
    text = page(TABLE | heavy)
    for target in KNOWN_TARGETS:
        assert f"| `{target}` | {len(some) // len(KNOWN_TARGETS)} |" in text
    for name in shipped_specs():
        assert f"| `{name}` | {len(load_spec(name).workloads())}" in text
    assert " in loops |" in text


def test_only_what_is_not_known_is_compiled(some: list[Variant]) -> None:
    known = {(v.name, v.target): Usage(1, 0, 0, "") for v in some}
    assert measure(some, known, jobs=1) == dict(sorted(known.items()))


@pytest.mark.parametrize(
    ("op", "pass_", "target"),
    [
        ("gated_sum", "backward", "cuda:86"),
        ("sliding_window_attention", "forward", "hip:gfx942"),
        ("compress", "backward", "cuda:120"),
        ("compressed_attention", "decode", "cuda:100"),
    ],
)
def test_some_compile(
    some: list[Variant],
    op: str,
    pass_: str,
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))
    (variant, *_) = (
        v for v in some if (v.workload.op, v.workload.pass_, v.target) == (op, pass_, target)
    )
    usage = usage_of(variant)
    assert list(problems({(variant.name, target): usage}, [variant])) == []


@pytest.mark.slow
def test_the_table_is_what_compiles_today(every: list[Variant]) -> None:
    """All of it anew: an hour or two of two cores, if nothing of it was compiled here before."""
    assert measure(every) == TABLE
