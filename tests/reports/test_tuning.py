"""The HTML page about searches."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from nsagen.cli.app import main
from nsagen.core.errors import InvalidInputError
from nsagen.reports.tuning import check_report, write_report
from nsagen.tune import session
from nsagen.tune.recording import load_recording
from tests.tune.conftest import World, one_op, world

__all__ = ["one_op", "world"]  # fixtures

RECORDINGS = Path(__file__).resolve().parents[2] / "benchmarks" / "recordings"


def test_the_page_is_whole_in_itself(world: World, tmp_path: Path) -> None:
    world.behave({"num_stages=4": "wrong"})
    result = world.tune(trials=14)
    result.notes.append("<script>alert(1)</script>")
    path = tmp_path / "page.html"
    write_report(path, result)
    page = path.read_text()
    assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|<link[^>]*\shref=|@import", page)
    for text in ("History", "Slices", "Parallel coordinates", "Importance"):
        assert text in page
    (record,) = result.records
    assert record.default is not None
    assert f"{record.ms:.4g}" in page
    assert f"{record.default.ms:.4g}" in page
    assert "WrongOutputError: o: relative error 3.0e-01 (limit 1e-02)" in page
    assert "<script>alert(1)" not in page
    for text in (
        'name="viewport"',
        "prefers-color-scheme: dark",
        "<details open>",
        "Plotly.react(",
    ):
        assert text in page
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    titles = [json.loads(figure)["layout"]["title"]["text"].split(":")[0] for figure in figures]
    assert titles[:3] == ["History", "Slices", "Parallel coordinates"]
    slices = json.loads(figures[1])["layout"]
    axes = [axis for name, axis in slices.items() if name.startswith("xaxis")]
    blocks = [axis["categoryarray"] for axis in axes]
    assert len(blocks) == 4  # algorithm, block, num_stages, num_warps
    assert all(values == sorted(values, key=int) for values in blocks if values[0].isdecimal())


@pytest.mark.parametrize(("device", "unit"), [("static-cuda-90", "cost"), ("nvidia-h200", "ms")])
def test_what_was_not_measured_has_no_milliseconds(
    world: World, tmp_path: Path, device: str, unit: str
) -> None:
    result = replace(world.tune(trials=6), device=device)
    write_report(tmp_path / "page.html", result)
    page = (tmp_path / "page.html").read_text()
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    layouts = [json.loads(figure)["layout"] for figure in figures]
    assert layouts[0]["yaxis"]["title"]["text"] == unit
    assert layouts[1]["title"]["text"] == f"Slices: {unit} by each knob's value"
    assert f"<th>default {unit}<th>" in page


def test_it_has_the_style_of_the_other_pages(world: World, tmp_path: Path) -> None:
    """Dark where the reader's screen is, as wide as a phone, and plots in the page's colours."""
    write_report(tmp_path / "page.html", world.tune(trials=6))
    page = (tmp_path / "page.html").read_text()
    style = resources.files("nsagen.reports").joinpath("page.css").read_text()
    assert style in page
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="viewport" content="width=device-width' in page
    plots = page.count('class="plot"')
    assert plots == page.count('"paper_bgcolor":"rgba(0, 0, 0, 0)"') == 4
    assert "responsive: true" in page


def test_a_search_in_which_nothing_ran_has_a_page(world: World, tmp_path: Path) -> None:
    world.behave({"": "memory"})
    result = world.tune(trials=3)
    write_report(tmp_path / "page.html", result)
    assert "no schedule ran" in (tmp_path / "page.html").read_text()
    write_report(tmp_path / "page.html", replace(result, studies=[], failures=[]))


def test_a_file_of_the_users_is_refused_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = RECORDINGS / "synthetic_compress_linear.jsonl.gz"
    monkeypatch.setattr(session, "ReplayEvaluator", None)  # no search begins
    mine = tmp_path / f"tune-replay-{load_recording(recording).facts['device']}.html"
    mine.write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["tune", "--simulate", str(recording), "--report", "--out", str(tmp_path)])
    assert end.value.code == 2
    assert f"{mine}: must be a new file or a page" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_without_plotly_no_search_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"nsagen\[plot\]"):
        check_report(tmp_path / "page.html")
