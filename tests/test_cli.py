"""The command line: what goes to stdout and stderr, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsagen.cli import app, main
from nsagen.codegen.target import parse_target
from nsagen.codegen.template import default_schedule
from nsagen.errors import BuildError
from nsagen.report import print_verification
from nsagen.spec import json_schema, load_spec

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("build", "doctor", "inspect", "verify")

FEW = """
name: few
attention: {head_dim: 32, gqa_ratio: 1, dtype: float32, compress_type: avgpool, kernel_size: 8,
  kernel_stride: 4, block_size: 16, topk: 4, window_size: 32}
passes: forward
targets: "cuda:80"
"""


def templates_missing() -> str:
    """The ops that have no template yet, as text."""
    missing = set()
    for workload in load_spec("tiny").workloads():
        try:
            default_schedule(workload, parse_target("cuda:80"))
        except BuildError:
            missing.add(workload.op)
    return ", ".join(sorted(missing))


needs_templates = pytest.mark.skipif(
    bool(templates_missing()), reason=f"no template yet for {templates_missing()}"
)


@pytest.fixture
def few(tmp_path: Path) -> str:
    path = tmp_path / "few.yaml"
    path.write_text(FEW)
    return str(path)


class Ran:
    """What a run of the command line in this process left."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        self.code = end.value.code or 0
        self.out, self.err = capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert "--json" in result.output


def test_help_lists_the_commands_that_exist() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bild"],
        ["build"],
        ["build", "tiny", "--cheque"],
        ["build", "tiny", "--jobs", "0"],
        ["build", "tiny", "--check", "--compile"],
        ["build", "tiny", "tiny"],
        ["build", "no_such_spec"],
        ["inspect"],
        ["inspect", "no_such.yaml"],
        ["verify", "tinny"],
    ],
)
def test_wrong_usage_exits_2_with_words_on_stderr_only(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    ran = Ran(capsys, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.strip()
    assert "Traceback" not in ran.err


def test_a_bad_spec_prints_file_and_line_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad, worse = tmp_path / "bad.yaml", tmp_path / "worse.yaml"
    bad.write_text("name: bad\n")
    worse.write_text("- 1\n")
    ran = Ran(capsys, "build", str(bad), str(worse))
    first, second = ran.err.splitlines()
    assert first.startswith(f"{bad}:1: attention: this key is required")
    assert second.startswith(f"{worse}:1: must be a mapping")


class TestInspect:
    def test_json_lists_every_workload(self, capsys: pytest.CaptureFixture[str]) -> None:
        ran = Ran(capsys, "inspect", "llama8b", "--json")
        content = json.loads(ran.out)
        assert ran.code == 0
        workloads = load_spec("llama8b").workloads()
        assert [w["label"] for w in content["workloads"]] == [w.label for w in workloads]
        assert {tuple(w["schedules"]) for w in content["workloads"]} == {("cuda:80", "cuda:90")}

    def test_the_table_names_every_workload_uncut(self, capsys: pytest.CaptureFixture[str]) -> None:
        ran = Ran(capsys, "inspect", "llama8b")
        assert all(w.label in ran.out for w in load_spec("llama8b").workloads())

    def test_schema(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert json.loads(Ran(capsys, "inspect", "--schema").out) == json_schema()


@needs_templates
class TestBuild:
    def test_build_then_check_then_a_stale_file(
        self, capsys: pytest.CaptureFixture[str], few: str, tmp_path: Path
    ) -> None:
        out = str(tmp_path / "out")
        built = Ran(capsys, "build", few, "--out", out, "--json")
        (row,) = json.loads(built.out)
        assert (built.code, row["spec"], row["removed"]) == (0, "few", [])
        assert Ran(capsys, "build", few, "--out", out, "--check").code == 0
        (again,) = json.loads(Ran(capsys, "build", few, "--out", out, "--json").out)
        assert again["written"] == []

        edited = next((tmp_path / "out" / "few" / "kernels").glob("rope_*.py"))
        edited.write_text(edited.read_text() + "# mine\n")
        stale = Ran(capsys, "build", few, "--out", out, "--check", "--json")
        assert stale.code == 1
        assert json.loads(stale.out) == [{"spec": "few", "path": str(edited), "state": "edited"}]
        assert str(edited) in Ran(capsys, "build", few, "--out", out, "--check").out
        assert Ran(capsys, "build", few, "--out", out).code == 0
        assert Ran(capsys, "build", few, "--out", out, "--check").code == 0

    def test_a_bad_spec_beside_a_good_one_builds_nothing(
        self, capsys: pytest.CaptureFixture[str], few: str, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        assert Ran(capsys, "build", few, "tinny", "--out", str(out)).code == 2
        assert not out.exists()

    def test_doctor_finds_a_stale_package(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        Ran(capsys, "build", "tiny", "--out", str(tmp_path))
        (tmp_path / "tiny" / "__init__.py").unlink()
        ran = Ran(capsys, "doctor", "--out", str(tmp_path), "--json")
        (problem,) = json.loads(ran.out)["problems"]
        assert ran.code == 1
        assert "__init__.py (missing); run: nsagen build tiny" in problem


@needs_templates
class TestVerify:
    @pytest.mark.interpreter
    def test_verify_compares_every_output(
        self, capsys: pytest.CaptureFixture[str], few: str
    ) -> None:
        ran = Ran(capsys, "verify", few, "--json")
        rows = json.loads(ran.out)
        assert {row["op"] for row in rows} == {w.op for w in load_spec(few).workloads()}
        assert {row["result"] for row in rows} == {"ok"}, rows
        assert all(row["error"] <= row["threshold"] for row in rows)
        assert ran.code == 0

    @pytest.mark.interpreter
    def test_verify_says_when_it_could_verify_nothing(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ran = Ran(capsys, "verify", "llama8b", "--op", "rope")
        assert ran.code == 1
        assert "skipped" in ran.out
        assert "nothing could be verified" in ran.err


def test_verify_needs_a_gpu_or_the_interpreter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, few: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = Ran(capsys, "verify", few)
    assert (ran.code, ran.out) == (1, "")
    assert "set TRITON_INTERPRET=1" in ran.err


def test_verify_refuses_an_op_that_the_spec_lacks(
    capsys: pytest.CaptureFixture[str], few: str
) -> None:
    ran = Ran(capsys, "verify", few, "--op", "ropes")
    assert ran.code == 2
    assert "got 'ropes'" in ran.err


def test_doctor_reads_as_json_and_as_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    facts = json.loads(Ran(capsys, "doctor", "--out", str(tmp_path), "--json").out)["facts"]
    text = Ran(capsys, "doctor", "--out", str(tmp_path)).out
    assert {"nsagen", "python", "torch", "triton", "GPUs", "user cache"} <= facts.keys()
    assert all(name in text for name in facts)


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    words = dict.fromkeys(("op", "pass", "workload", "output", "note"), "x")
    print_verification([words | {"error": 1e-7, "threshold": 1e-5, "result": "ok"}])
    green = "\x1b[32m"
    assert (green in capsys.readouterr().out) is not no_color


def test_python_m_nsagen_is_the_command_line() -> None:
    command = [sys.executable, "-m", "nsagen", "build", "tinny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("spec: ")
    assert len(done.stderr.splitlines()) == 1


def test_help_and_a_bad_spec_load_nothing_heavy() -> None:
    code = (
        "import sys; from nsagen.cli import main\n"
        "try: main({})\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({{'torch', 'triton', 'jinja2'}} & sys.modules.keys()) or 0)"
    )
    for arguments in (["--help"], ["build", "--help"], ["build", "no_such_spec"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
