"""Results carry their provenance, and tables and figures show what they hold."""

import json
import sys
from pathlib import Path

import pytest

from nsagen.bench import measure, results
from nsagen.bench.plot import check_free as check_figure
from nsagen.bench.plot import plot
from nsagen.bench.results import check_free, write_results
from nsagen.cli.app import main
from nsagen.core.errors import InvalidInputError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

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


def test_a_script_is_named_by_its_path(monkeypatch):
    monkeypatch.setattr(results.sys, "argv", ["benchmarks/one.py", "--seconds", "3", "--out", "x"])
    monkeypatch.setattr(results.sys.modules["__main__"], "__spec__", None)
    assert results.provenance()["command"] == "python benchmarks/one.py --seconds 3"


@pytest.mark.parametrize("out", [["--out", "a folder"], ["--out=there"], []])
def test_where_results_go_is_no_part_of_the_command(out, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nsagen", "bench", *out, "--set", "kv_heads=2"])
    monkeypatch.setitem(sys.modules, "__main__", None)
    content = json.loads(write_results("prefill", ROWS, tmp_path).read_text())
    assert content["provenance"]["command"] == "nsagen bench --set kv_heads=2"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 1}', '{"rows": [], "provenance": {}}', '{"rows": [{"what": 3}]}']
)
def test_a_file_that_holds_no_results_is_not_drawn(content, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "prefill.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["bench", "plot", str(path)])
    assert end.value.code == 2
    assert f"{path}: must be what nsagen bench wrote" in capsys.readouterr().err
    assert not path.with_suffix(".png").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        main(["bench", "plot", str(tmp_path / "prefill.json")])
    assert end.value.code == 2
    assert "run: pip install 'nsagen[plot]'" in capsys.readouterr().err


def test_a_figure_is_drawn_beside_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    figure = plot(write_results("prefill", ROWS, tmp_path))
    assert figure == tmp_path / "prefill.png"
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["prefill.json", "decode.json", "decode.png", "prefill.tmp"])
def test_a_file_of_the_users_is_refused_before_anything_runs(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "require_gpu", lambda what: None)
    mine = tmp_path / name
    mine.write_text('{"rows": "mine"}')
    if name == "prefill.tmp":  # beside the results: nothing of it is touched
        write_results("prefill", ROWS, tmp_path)
    else:
        with pytest.raises(SystemExit) as end:
            main(["bench", mine.stem, "--out", str(tmp_path)])
        assert end.value.code == 2
        assert f"{mine}: must be a new file or" in capsys.readouterr().err
    assert mine.read_text() == '{"rows": "mine"}'


def test_a_figure_replaces_figures_of_nsagen_alone(tmp_path):
    pytest.importorskip("matplotlib")
    results = write_results("prefill", ROWS, tmp_path)
    figure = plot(results)
    assert plot(results) == figure
    figure.write_bytes(b"\x89PNG\r\nmine")
    with pytest.raises(InvalidInputError, match="a figure that nsagen wrote"):
        plot(results)
    assert figure.read_bytes() == b"\x89PNG\r\nmine"


def test_committed_results_may_be_replaced():
    folder = RESULTS / "nvidia-h200"
    for name in ("decode", "prefill", "train"):
        check_figure(check_free(name, folder).with_suffix(".png"))


@pytest.mark.parametrize(("said", "told"), [("580.1", "580.1"), (None, "")])
def test_the_driver_is_the_one_that_doctor_tells(said, told, monkeypatch):
    """An answer of nvidia-smi that is no version is none."""
    monkeypatch.setattr(results.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(results, "driver_version", lambda: said)
    assert results.provenance()["driver"] == told
