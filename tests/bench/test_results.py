"""Results carry their provenance, and tables and figures show what they hold."""

import json
import sys

import pytest

from nsagen.bench.plot import plot
from nsagen.bench.results import table_text, write_results

ROWS = [
    {"what": what, "tokens": tokens, "ms": tokens / scale}
    for tokens in (1024, 2048)
    for what, scale in (("dense attention (cuDNN)", 100), ("rope", 9000), ("attention", 300))
]


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "results"))
    path = write_results("prefill", ROWS)
    content = json.loads(path.read_text())
    assert path == tmp_path / "results" / "prefill.json"
    assert content["rows"] == ROWS
    assert content["provenance"].keys() >= {"device", "driver", "torch", "triton", "command"}


@pytest.mark.parametrize("out", [["--out", "a folder"], ["--out=there"], []])
def test_where_results_go_is_no_part_of_the_command(out, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nsagen", "bench", *out, "--set", "kv_heads=2"])
    monkeypatch.setitem(sys.modules, "__main__", None)
    content = json.loads(write_results("prefill", ROWS, tmp_path).read_text())
    assert content["provenance"]["command"] == "nsagen bench --set kv_heads=2"


def test_a_table_lines_up_and_leaves_blank_what_a_row_lacks():
    text = table_text([*ROWS[:1], {"what": "x"}], {"what": "<26", "tokens": ">8", "ms": ">9.2f"})
    assert text.splitlines() == [
        "what                        tokens       ms",
        "dense attention (cuDNN)       1024    10.24",
        "x",
    ]


def test_a_figure_is_drawn_beside_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    figure = plot(write_results("prefill", ROWS, tmp_path))
    assert figure == tmp_path / "prefill.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
