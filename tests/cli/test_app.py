"""The command line: what goes to stdout and stderr, and the exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsagen.cli.app import app, main
from nsagen.cli.verify import print_verification
from nsagen.codegen import template
from nsagen.codegen.owned import note_files
from nsagen.codegen.plan import Variant
from nsagen.core.errors import InvalidInputError
from nsagen.core.releases import Releases
from nsagen.runtime.user_cache import cache_folder
from nsagen.spec import json_schema, load_spec
from tests.one_op import SPEC, one_op

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["one_op"]  # a fixture

COMMANDS = ("build", "doctor", "generate", "inspect", "plan", "tune", "verify")


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output goes to a pipe of no width, whatever the tests themselves run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


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
    assert all(command in result.output for command in (*COMMANDS, "bench"))


def test_benchmarks_are_a_group_whose_help_shows_an_example() -> None:
    assert "decode" in CliRunner().invoke(app, ["bench", "--help"]).output
    result = CliRunner().invoke(app, ["bench", "decode", "--help"])
    assert result.exit_code == 0
    assert "Example: nsagen bench decode" in result.output
    refused = CliRunner().invoke(app, ["bench", "decode", "--batch", "0"])
    assert isinstance(refused.exception, InvalidInputError)


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
        ["tune", "tiny", "--op", "ropes"],
        ["tune", "tiny", "--pass", "sideways"],
        ["tune", "tiny", "--time", "soon"],
        ["tune", "tiny", "--seqlens", "2048,-1"],
        ["tune", "tiny", "--objective", "hope"],
        ["build", "tiny", "--tuned", "nowhere"],
        ["build", "tiny", "--check", "--tuned", "README.md"],
        ["tune", "tiny", "--objective", "static", "--target", "cuda:80", "--study", ""],
        ["tune", "tiny", "--sampler", "oracle"],
        ["tune", "tiny", "--target", "cuda:90"],
        ["tune", "tiny", "--study", "file.db", "--objective", "static"],
        ["tune", "tiny", "--record-exhaustive", "x.jsonl.gz"],
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


class TestBuild:
    def test_it_writes_a_package_and_then_nothing_more(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        built = Ran(capsys, "build", "few.yaml", "--json")
        (row,) = json.loads(built.out)
        assert (built.code, row["folder"], row["variants"]) == (0, "generated/few", 4)
        assert {"__init__.py", "dispatcher.py", "manifest.json"} <= set(row["written"])
        (again,) = json.loads(Ran(capsys, "build", "few.yaml", "--json").out)
        assert (again["written"], again["removed"]) == ([], [])

    def test_the_summary_is_one_line_a_spec(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        ran = Ran(capsys, "build", "few.yaml", "--out", "elsewhere")
        assert ran.out == "few: 4 kernels in elsewhere/few; 8 files written, 0 removed\n"

    @pytest.mark.parametrize("state", ["edited", "missing", "orphaned"])
    def test_check_names_each_file_that_is_not_up_to_date(
        self, capsys: pytest.CaptureFixture[str], one_op: Path, state: str
    ) -> None:
        Ran(capsys, "build", "few.yaml")
        path = next(Path("generated/few/kernels").glob("gated_sum_*.py"))
        if state == "edited":
            path.write_text(path.read_text() + "# mine\n")
        elif state == "missing":
            path.unlink()
        else:
            text = "# of a build that was stopped\n"
            note_files(Path("generated/few"), {"kernels/gated_sum_of_old.py": text})
            path = path.with_name("gated_sum_of_old.py")
            path.write_text(text)
        told = Ran(capsys, "build", "few.yaml", "--check")
        assert told.code == 1
        assert told.out.splitlines()[0] == f"{state}: {path}"
        assert "run: nsagen build few.yaml" in told.out
        as_json = Ran(capsys, "build", "few.yaml", "--check", "--json")
        assert json.loads(as_json.out) == [
            {"spec": "few", "path": str(path), "state": state, "why": ""}
        ]
        assert Ran(capsys, "build", "few.yaml").code == 0
        assert Ran(capsys, "build", "few.yaml", "--check").out == "few: up to date\n"

    @pytest.mark.parametrize("cause", ["a template", "the spec", "nsagen's version"])
    def test_check_says_what_changed(
        self,
        capsys: pytest.CaptureFixture[str],
        one_op: Path,
        cause: str,
    ) -> None:
        Ran(capsys, "build", "few.yaml")
        edited = Path("generated/few/kernels/__init__.py")
        edited.write_text("# mine\n")
        if cause == "a template":
            (path,) = one_op.rglob("gated_sum/*.py.j2")
            path.write_text(path.read_text().replace("total += ", "total = total + "))
            template.forget()
        elif cause == "the spec":
            spec = Path("few.yaml")
            spec.write_text(spec.read_text() + "# a remark\n")
        else:
            manifest = Path("generated/few/manifest.json")
            content = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(content | {"nsagen": "0.0.1"}))
        lines = Ran(capsys, "build", "few.yaml", "--check").out.splitlines()
        assert f"edited: {edited}" in lines
        stale = [line for line in lines if line.startswith(("outdated", "missing", "orphaned"))]
        assert stale
        assert all(line.endswith(f"({cause} changed)") for line in stale)

    def test_a_bad_spec_beside_a_good_one_builds_nothing(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        assert Ran(capsys, "build", "few.yaml", "tinny").code == 2
        assert not Path("generated").exists()

    def test_a_template_that_fails_exits_1_with_one_line(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        path = one_op / "templates" / "gated_sum" / "forward_elementwise.py.j2"
        path.write_text(path.read_text().replace("v_head_dim", "head_dim"))
        ran = Ran(capsys, "build", "few.yaml")
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith("nsagen: templates/gated_sum/forward_elementwise.py.j2")

    def test_doctor_finds_a_stale_package(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        Path("specs").mkdir()
        Path("few.yaml").rename("specs/few.yaml")
        Ran(capsys, "build", "few")
        Path("generated/few/__init__.py").unlink()
        ran = Ran(capsys, "doctor", "--json")
        (problem,) = json.loads(ran.out)["problems"]
        assert ran.code == 1
        assert problem.startswith("generated/few: not up to date: 1 file, such as __init__.py")

    def test_doctor_reports_what_it_cannot_read(
        self, capsys: pytest.CaptureFixture[str], one_op: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", "here")

        Ran(capsys, "build", "few.yaml")
        monkeypatch.setattr("nsagen.codegen.build.check", refuse)
        monkeypatch.setattr("nsagen.cli.doctor._is_of_kernels", refuse)
        monkeypatch.setenv("NSAGEN_CACHE_DIR", "cache")
        Path("cache/a").mkdir(parents=True)
        problems = json.loads(Ran(capsys, "doctor", "--json").out)["problems"]
        assert "here: cannot be read: Permission denied" in problems
        assert any("cannot be read: Permission denied" in p and "cache" in p for p in problems)


class TestVerify:
    @pytest.mark.interpreter
    def test_it_compares_every_output_of_every_kernel(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        ran = Ran(capsys, "verify", "few.yaml", "--json")
        rows = json.loads(ran.out)
        assert ran.code == 0
        assert len({row["variant"] for row in rows}) == 4
        assert {(row["op"], row["output"], row["result"]) for row in rows} == {
            ("gated_sum", "o", "ok")
        }
        assert all(row["error"] <= row["threshold"] == 1e-5 for row in rows)
        assert "1.0e-05" in Ran(capsys, "verify", "few.yaml").out

    @pytest.mark.interpreter
    @pytest.mark.parametrize(
        ("mistake", "note"), [(" * 1.001", ""), (" / nothing", "NameError"), (" / 0", "")]
    )
    def test_a_wrong_kernel_fails(
        self, capsys: pytest.CaptureFixture[str], one_op: Path, mistake: str, note: str
    ) -> None:
        path = one_op / "templates" / "gated_sum" / "space.py"
        path.write_text(path.read_text().replace('"mistake": ""', f'"mistake": "{mistake}"'))
        ran = Ran(capsys, "verify", "few.yaml", "--json")
        rows = json.loads(ran.out)
        assert ran.code == 1
        assert {row["result"] for row in rows} == {"failed"}
        assert all(note in row["note"] for row in rows)

    @pytest.mark.interpreter
    def test_strides_that_a_kernel_overlooks(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        path = one_op / "templates" / "gated_sum" / "forward_elementwise.py.j2"
        path.write_text(path.read_text().replace("if not all(", "if False and all("))
        rows = json.loads(Ran(capsys, "verify", "few.yaml", "--json").out)
        assert {(row["result"], row["note"]) for row in rows} == {
            ("failed", "with the rows of o_compressed, o_selected, o_sliding, gate apart")
        }

    @pytest.mark.interpreter
    def test_the_interpreter_runs_bfloat16s_kernels_in_float16(
        self, capsys: pytest.CaptureFixture[str], one_op: Path
    ) -> None:
        """It takes bfloat16's bits for other numbers; the other dtype of two bytes is right."""
        Path("few.yaml").write_text(SPEC.replace("DTYPE", "bfloat16"))
        ran = Ran(capsys, "verify", "few.yaml", "--json")
        assert ran.code == 0
        rows = json.loads(ran.out)
        assert {(row["result"], row["threshold"]) for row in rows} == {("ok", 2e-3)}
        assert all(row["note"].startswith("in float16") for row in rows)
        assert all("bf16" in row["workload"] for row in rows)

    @pytest.mark.interpreter
    def test_verifying_nothing_is_a_failure(
        self, capsys: pytest.CaptureFixture[str], one_op: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Variant, "triton", Releases((3, 6), (3, 9)))
        ran = Ran(capsys, "verify", "few.yaml")
        assert ran.code == 1
        assert "skipped: Triton's interpreter runs no Gluon" in ran.out
        assert "nothing could be verified" in ran.err

    def test_it_needs_a_gpu_or_the_interpreter(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        ran = Ran(capsys, "verify", "tiny")
        assert (ran.code, ran.out) == (1, "")
        assert "set TRITON_INTERPRET=1" in ran.err

    def test_it_refuses_an_op_that_the_spec_lacks(self, capsys: pytest.CaptureFixture[str]) -> None:
        ran = Ran(capsys, "verify", "tiny", "--op", "ropes")
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


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("biuld tiny", "build"),
        ("inspect tinny", "tiny"),
        ("inspect tiny --html page.html --target cuda90", "cuda:90"),
        ("tune tiny --objectiv static", "--objective"),
        ("tune tiny --objective statik", "static"),
        ("tune tiny --sampler ranom", "random"),
        ("tune tiny --objective static --op ropee", "rope"),
        ("verify tiny --op gated-sums", "gated_sum"),
        ("verify --implementation math:sin --size dtype=float-16", "float16"),
        ("plan llama8b --gpu H20", "h200"),
        ("plan llama8b --cache-dtype int-8", "int8"),
        ("export tiny --layout kernel", "kernels"),
        ("bench prefill --set topp=8", "topk"),
        ("bench prefill --selection learnt", "learned"),
    ],
)
def test_what_is_misspelled_is_told_with_the_nearest_right_spelling(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, *typed.split())
    assert ran.code == 2
    assert re.search(rf"([Dd]id you mean|Possible options:) '?{meant}\b", ran.err), ran.err


def test_a_shell_completes_commands_and_the_names_of_specs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_NSAGEN_COMPLETE", "complete_bash")
    for typed, expected in (("nsagen ins", "inspect"), ("nsagen build ti", "tiny")):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        assert Ran(capsys).out.split() == [expected]


def test_doctor_knows_the_kernels_of_other_versions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))
    for folder in (cache_folder(), tmp_path / "0.0.1-01234567"):
        (folder / "cuda-90").mkdir(parents=True)
        (folder / "cuda-90" / "kernel.py").touch()
    diagnosis = json.loads(Ran(capsys, "doctor", "--out", str(tmp_path), "--json").out)
    assert diagnosis["facts"]["user cache"] == f"{tmp_path} (1 kernel of this version)"
    (note,) = [text for text in diagnosis["notes"] if "other versions" in text]
    assert note.endswith("; to remove them, run: nsagen doctor --prune")


def test_doctor_removes_the_kernels_of_other_versions_and_nothing_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))
    kept = [cache_folder(), tmp_path / "tune", tmp_path / "0.0.1-01234567-of-mine"]
    old = [tmp_path / f"0.0.1-{i:08x}" for i in range(40)]
    for folder in (*kept, *old):
        (folder / "cuda-90-triton-3.6.0").mkdir(parents=True)
        (folder / "cuda-90-triton-3.6.0" / "kernel.py").touch()
    (old[0] / "cuda-90-triton-3.6.0" / "notes.txt").touch()  # somebody's own
    told = Ran(capsys, "doctor", "--out", str(tmp_path))
    (line,) = [line for line in told.out.splitlines() if "other versions" in line]
    assert len(line) < 160
    assert line.endswith("run: nsagen doctor --prune")
    pruned = Ran(capsys, "doctor", "--prune", "--out", str(tmp_path)).out
    assert f"removed 39 kernels of other versions from {tmp_path}" in pruned
    assert "run: nsagen doctor --prune" not in pruned
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {*kept, old[0]}


def test_doctor_tells_a_torch_for_cpus_on_a_machine_with_a_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsagen.cli.doctor.driver_version", lambda problems: "580.1")
    monkeypatch.setattr("nsagen.cli.doctor._gpus", lambda problems: [])
    monkeypatch.setattr("nsagen.cli.doctor._built_for_cpu", lambda: True)
    ran = Ran(capsys, "doctor", "--out", str(tmp_path), "--json")
    (problem,) = json.loads(ran.out)["problems"]
    assert ran.code == 1
    assert problem.startswith("a GPU driver is installed, but this torch is built for CPUs")


def test_help_and_a_bad_spec_load_nothing_heavy() -> None:
    code = (
        "import sys; from nsagen.cli.app import main\n"
        "try: main({})\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({{'torch', 'triton', 'jinja2'}} & sys.modules.keys()) or 0)"
    )
    for arguments in (["--help"], ["build", "--help"], ["build", "no_such_spec"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("1 +", "SyntaxError"),
        ("", "AttributeError: module 'theirs'"),
    ],
)
def test_a_module_to_verify_that_cannot_be_imported(
    code: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "theirs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    ran = Ran(capsys, "verify", "--implementation", "theirs:f", "--op", "selected_attention")
    assert ran.code == 2
    assert said in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "tiny", "--out", ""],
        ["build", "tiny", "--tuned="],
        ["doctor", "--out", ""],
        ["inspect", "tiny", "--html", ""],
        ["tune", "tiny", "--record-exhaustive", ""],
        ["bench", "train", "--out="],
        ["plan", "tiny", "--results", ""],
    ],
)
def test_an_empty_path_is_not_the_working_folder(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    option = next(text for text in arguments if text.startswith("--")).removesuffix("=")
    assert f"nsagen: {option} must be a path; got an empty text" in capsys.readouterr().err


def test_plan_says_which_heads_a_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(Ran(capsys, "plan", "llama8b", "--batch", "1").out.split())
    assert "gqa_ratio 4: 32 query heads of 128 over 8 for keys and values; gqa_ratio 16: " in said
    assert "1 x h200, 1 sequence of 131,072 tokens" in said
