"""Tables at the widths of terminals: whole, with broken cells, or each row as lines."""

from __future__ import annotations

import re

import pytest

from nsagen.cli.app import main
from nsagen.cli.table import print_table

HEADINGS = ("op", "workload", "schedule", "ms")
ROWS = [
    ("rope", "f16_d32", "row_tiles(block_rows=8, num_warps=1, num_stages=4, programs=264)", "0.25"),
    ("rope", "f16_d64", "row_tiles(block_rows=4, num_warps=1, num_stages=4, programs=264)", "1.50"),
    ("gate", "f16_d32", "", "12.00"),
]


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("best [x] of all", HEADINGS, ROWS, names=2, right={"ms"}, broken={"schedule"})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    return [line.rstrip() for line in lines]


def test_where_there_is_room_a_row_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    title, _, head, _, first, second, _, third, _ = printed(capsys, monkeypatch, 120)
    assert title == "best [x] of all"
    assert re.findall(r"[^┃\s]+", head) == list(HEADINGS)
    assert re.findall(r"[^│\s]+", first)[:2] == ["rope", "f16_d32"]
    assert re.findall(r"[^│\s]+", second)[0] == "f16_d64"  # the op is the same
    assert third.endswith(" 12.00 │")


def test_long_cells_are_broken_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(printed(capsys, monkeypatch, 80))
    assert "┃ op" in text
    assert "programs=264)" in text


def test_on_a_narrow_terminal_each_row_becomes_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(capsys, monkeypatch, 60)
    assert lines[:2] == ["best [x] of all", "rope f16_d32"]
    assert lines[-2:] == ["gate f16_d32", "  ms 12.00"]
    text = " ".join(line.strip() for line in lines)
    for _, _, schedule, ms in ROWS[:2]:
        assert f"schedule {schedule} ms {ms}" in text


def test_on_a_narrow_terminal_numbers_stay_whole_and_below_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("nsa", "8.25 s", "", "7 of 32"), ("dense", "1,132.25 s", "full", "12 of 32")]
    print_table("plan", ("model", "prefill", "note", "largest batch"), rows)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "plan",
        "nsa",
        "  prefill 8.25 s;",
        "  largest batch 7 of 32",
        "dense",
        "  prefill 1,132.25 s; note full",
        "  largest batch 12 of 32",
    ]


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "command", ["inspect tiny", "doctor", "plan llama8b --gpu h200 --context 131072 --batch 32"]
)
def test_what_a_command_prints_fits(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main(command.split())
    lines = capsys.readouterr().out.splitlines()
    to_copy = ("note: ", "problem: ")
    assert max(len(line) for line in lines if not line.startswith(to_copy)) <= width
    assert not any("…" in line for line in lines)
