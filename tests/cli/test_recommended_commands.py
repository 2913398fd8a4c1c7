"""What commands and packages recommend works when it is pasted, wherever that is."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import nsagen
from nsagen.cases import reproduce
from nsagen.cases.base import Sizes
from nsagen.cli import doctor
from nsagen.core.errors import NsagenError
from nsagen.core.packages import from_here
from nsagen.core.paths import specs_dir
from nsagen.reports import support_page
from nsagen.runtime.user_cache import cache_folder
from nsagen.spec import load as loading
from nsagen.spec import load_spec
from nsagen.tune.selection import specs_of
from tests.cli.test_app import Ran
from tests.one_op import SPEC, one_op

__all__ = ["one_op"]  # a fixture

PACKAGE = Path(nsagen.__file__).parent
ROOTS = loading.project_roots


def pasted(capsys: pytest.CaptureFixture[str], text: str) -> Ran:
    command = shlex.split(text[text.index("nsagen build") :])
    return Ran(capsys, *command[1:])


@pytest.fixture
def spec(one_op: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spec outside of any project, in a folder with a blank; the working folder is another."""
    path = one_op / "my specs" / "it's.yaml"
    path.parent.mkdir()
    path.write_text(SPEC.replace("DTYPE", "float32"))
    monkeypatch.setattr(loading, "project_roots", lambda path: iter(()))
    (one_op / "elsewhere").mkdir()
    monkeypatch.chdir(one_op / "elsewhere")
    return path


@functools.cache
def code_files() -> list[str]:
    """The text of each of nsagen's modules."""
    return [path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))]


@functools.cache
def written_texts() -> list[str]:
    """Every text in nsagen's code that may name a command, docstrings aside."""
    texts = []
    for code in code_files():
        if not re.search("nsagen [a-z]|pip install", code):
            continue
        nodes = list(ast.walk(ast.parse(code)))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts += [
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and id(node) not in docstrings
            if isinstance(node.value, str)
        ]
    return texts


def found(pattern: str) -> list[str]:
    """The first groups of all matches in nsagen's texts."""
    return sorted({one[1] for text in written_texts() for one in re.finditer(pattern, text)})


def required_extras() -> list[str]:
    """The extras that `require_extra` tells to install."""
    return sorted(
        {x for text in code_files() for x in re.findall(r'require_extra\([^,]+, "(\w+)"', text)}
    )


INTRODUCED = r"(?:Example: |such as: |name one: |Start with: |run: |, then )"
COMMANDS = found(INTRODUCED + r"((?:TRITON_INTERPRET=1 )?nsagen .*?)(?=;|, then |$)")
COMMANDS += found(r"(?:[Ss]ee|run) (nsagen [a-z]+)\b(?! $)")  # what follows may be computed
INSTALLS = [one for one in found(r"(pip install .*?)(?: \(|;|$)") if not one.endswith("[")]
INSTALLS += [f"pip install 'nsagen[{extra}]'" for extra in required_extras()]


def test_the_commands_in_the_code_are_found() -> None:
    """What is spelled in the code; the others are made by `build_command` and tested below."""
    assert "nsagen build llama8b tiny --compile" in COMMANDS
    assert "TRITON_INTERPRET=1 nsagen verify tiny" in COMMANDS
    assert "nsagen doctor" in COMMANDS
    assert "pip install 'nsagen[plot]'" in INSTALLS
    assert len(COMMANDS) >= 14
    assert len(INSTALLS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_written_commands_exist(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that need a GPU or hours are run with --help, which refuses unknown options."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.removeprefix("TRITON_INTERPRET=1 "))
    assert Ran(capsys, *words[1:], "--help").code == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] == "inspect"])
def test_quick_written_commands_run(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my folder").mkdir()
    monkeypatch.chdir(tmp_path / "my folder")
    assert Ran(capsys, *shlex.split(command)[1:]).code == 0


@pytest.mark.parametrize("command", INSTALLS)
def test_what_pip_is_told_to_install_is_what_nsagen_needs(command: str, tmp_path: Path) -> None:
    """A shell runs it with a stand-in for pip, which has no network: it notes its arguments."""
    tools, here = tmp_path / "tools", tmp_path / "my folder"
    for folder in (tools, here):
        folder.mkdir()
    (tools / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.said"\n')
    (tools / "pip").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], cwd=here, env={"PATH": path}, check=True)
    verb, wanted, *options = (tools / "pip.said").read_text().splitlines()
    assert verb == "install"
    assert not list(here.iterdir()), "nothing was taken for a redirection"
    requirement = Requirement(wanted)
    about = importlib.metadata.metadata("nsagen")
    if requirement.name == "nsagen":
        assert requirement.extras <= set(about.get_all("Provides-Extra") or ())
    else:
        needed = {Requirement(text).name for text in importlib.metadata.requires("nsagen") or ()}
        assert requirement.name in needed
    assert not options or (options[0] == "--index-url" and options[1].startswith("https://"))


def test_the_command_that_renews_the_support_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --help: the work itself takes an hour."""
    monkeypatch.chdir(tmp_path)
    program, script, *options = shlex.split(support_page.COMMAND)
    assert program == "python"
    monkeypatch.setattr(sys, "argv", [script, *options, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 0
    assert "--support" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [Sizes((0, 3), 2, 64), Sizes((5,), 1, 128, 32)])
def test_the_command_that_reproduces_a_call(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It parses to the same call, which a stand-in notes."""
    workload = next(w for w in load_spec("tiny").workloads() if w.pass_ == "decode")
    given = reproduce.Reproduction(workload, "cuda:80", sizes, "rows", 7)
    runs: list[reproduce.Reproduction] = []
    monkeypatch.setattr(reproduce.Reproduction, "run", lambda self: runs.append(self) or [])
    assert reproduce.main(shlex.split(given.command)[3:]) == 0
    assert runs == [given]


@pytest.mark.parametrize("out", [(), ("--out", "[my] out")])
def test_the_remedies_of_check_and_doctor(
    capsys: pytest.CaptureFixture[str], spec: Path, out: tuple[str, ...]
) -> None:
    assert Ran(capsys, "build", str(spec), *out).code == 0
    (made,) = Path().glob("*/few/__init__.py")
    for examine in (("build", str(spec), "--check", *out), ("doctor", *out)):
        made.write_text("# edited\n")
        told = Ran(capsys, *examine)
        (line,) = [line for line in told.out.splitlines() if "nsagen build" in line]
        assert pasted(capsys, line).code == 0
        assert Ran(capsys, "build", str(spec), "--check", *out).code == 0


def told_by_load() -> str:
    with pytest.raises(NsagenError) as error:
        nsagen.load("few")
    return str(error.value)


def missing(package: Path) -> str:
    """No package; the working folder is below one that has the spec."""
    shutil.rmtree(package)
    return told_by_load()


def cut_short(package: Path) -> str:
    """A build that was killed wrote no table, and the manifest is of no build."""
    for name in ("dispatcher.py", "manifest.json"):
        (package / name).unlink()
    return told_by_load()


def without_table(package: Path) -> str:
    (package / "dispatcher.py").write_text("dispatcher = None\n")
    return told_by_load()


def damaged_kernel(package: Path) -> str:
    for path in package.glob("kernels/gated_sum*.py"):
        path.write_text("def launch(:\n")
    dispatcher = nsagen.load("few")
    workload = load_spec(package.parents[1] / "specs" / "few.yaml").workloads()[0]
    with pytest.raises(NsagenError) as error:
        dispatcher.launcher(workload, torch.device("cuda", 0), 1)
    return str(error.value)


def stale(package: Path) -> str:
    """As doctor says it, asked about the folder by its absolute path."""
    (package / "__init__.py").write_text("# edited\n")
    diagnosis = doctor.examine(package.parent.absolute())
    (problem,) = [text for text in diagnosis["problems"] if "nsagen build" in text]
    return problem


@pytest.mark.parametrize("tell", [missing, cut_short, without_table, damaged_kernel, stale])
@pytest.mark.parametrize("place", ["my project/specs/few.yaml", "my specs/an own.yaml"])
def test_every_command_works_from_another_folder(
    capsys: pytest.CaptureFixture[str],
    spec: Path,
    tell: Callable[[Path], str],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a spec beside its package or far away, with blanks, outside of any project."""
    project = spec.parents[1] / "my project"
    source, package = spec.parents[1] / place, project / "generated" / "few"
    source.parent.mkdir(parents=True, exist_ok=True)
    (project / "specs").mkdir(parents=True, exist_ok=True)
    for path in {source, project / "specs" / "few.yaml"}:
        path.write_text(spec.read_text())
    assert Ran(capsys, "build", str(source), "--out", str(package.parent)).code == 0
    (spec.parents[1] / "elsewhere" / "specs").mkdir()  # a spec of this name that is another
    (spec.parents[1] / "elsewhere" / "specs" / "few.yaml").write_text("name: other\n")
    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:80")
    monkeypatch.syspath_prepend(project)
    for name in [m for m in sys.modules if m.split(".")[0] == "generated"]:
        monkeypatch.delitem(sys.modules, name)
    if tell is missing:
        monkeypatch.chdir(project / "specs")
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(project)])
    told = tell(package)
    if tell is cut_short and source.parent != project / "specs":  # only the manifest knew the place
        assert f"give nsagen build the path of its spec, which {package} does not know" in told
        return
    assert pasted(capsys, told.splitlines()[-1]).code == 0
    built = project / "specs" / "generated" if tell is missing else package.parent
    source = project / "specs" / "few.yaml" if tell is missing else source
    assert Ran(capsys, "build", str(source), "--check", "--out", str(built)).code == 0


def test_a_check_with_records_of_its_own_recommends_them_again(
    capsys: pytest.CaptureFixture[str], spec: Path
) -> None:
    Path("my records").mkdir()
    told = Ran(capsys, "build", str(spec), "--check", "--tuned", "my records").out
    assert "--tuned 'my records'" in told
    assert pasted(capsys, told.splitlines()[-1]).code == 0


def test_a_spec_whose_name_looks_like_an_option(
    capsys: pytest.CaptureFixture[str], one_op: Path
) -> None:
    Path("few.yaml").rename("-few.yaml")
    assert Ran(capsys, "build", "./-few.yaml").code == 0
    Path("generated/few/__init__.py").write_text("# edited\n")
    told = Ran(capsys, "build", "./-few.yaml", "--check").out
    assert pasted(capsys, told.splitlines()[-1]).code == 0
    assert Ran(capsys, "build", "./-few.yaml", "--check").code == 0


def test_a_package_in_a_project_says_nothing_of_the_machine(
    capsys: pytest.CaptureFixture[str], one_op: Path
) -> None:
    (one_op / "pyproject.toml").touch()
    assert Ran(capsys, "build", str(one_op / "few.yaml")).code == 0
    assert json.loads(Path("generated/few/manifest.json").read_text())["spec"].keys() == {
        "name",
        "sha256",
    }


def test_a_command_that_was_found_in_the_root_folder_works_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir("/")
    assert from_here(Path("/my/few.yaml")) == "/my/few.yaml"


def test_doctor_names_a_package_whose_spec_is_gone(
    capsys: pytest.CaptureFixture[str], spec: Path
) -> None:
    assert Ran(capsys, "build", str(spec)).code == 0
    spec.unlink()
    told = Ran(capsys, "doctor")
    assert told.code == 1
    assert "generated/few: cannot be checked" in " ".join(told.out.split())


@pytest.mark.parametrize("name", ["few.yaml", "specs/few.yaml", "sub/my own.yaml", "../few.yaml"])
@pytest.mark.parametrize("root", [False, True])
def test_the_command_of_a_package_finds_the_spec_from_where_it_was_built(
    capsys: pytest.CaptureFixture[str],
    spec: Path,
    name: str,
    root: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if root:
        monkeypatch.setattr(loading, "project_roots", ROOTS)
        (spec.parents[1] / ".git").mkdir()
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(spec.read_text())
    assert Ran(capsys, "build", name).code == 0
    manifest = json.loads(Path("generated/few/manifest.json").read_text())
    assert pasted(capsys, manifest["command"]).code == 0
    assert Ran(capsys, "build", name, "--check").code == 0
    assert [one.name for one in specs_of(None, Path("generated"))] == ["few"]


@pytest.mark.parametrize("where", ["manifest.json", "__init__.py", "dispatcher.py"])
def test_a_package_with_conflicts_of_branches_is_named_with_a_way_out(
    capsys: pytest.CaptureFixture[str], spec: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest says nothing any more, and nothing else says whose a changed file is."""
    monkeypatch.setattr(loading, "project_roots", ROOTS)
    Path(".git").mkdir()
    Path("specs").mkdir()
    Path("specs/few.yaml").write_text(spec.read_text())
    assert Ran(capsys, "build", "few").code == 0
    folder = Path("generated/few")
    for name in {"manifest.json", where}:
        text = (folder / name).read_text()
        (folder / name).write_text(f"<<<<<<< HEAD\n{text}=======\n{text}>>>>>>> theirs\n")
    for command in (["doctor"], ["build", "few", "--check"]):
        told = Ran(capsys, *command)
        assert told.code == 1
        said = " ".join(told.out.split())
        assert f"{folder}" in said
        remedy = said[said.index("not up to date") :]
        assert (f"move {folder / where} away" in remedy) is (where != "manifest.json")
    assert "edited: generated/few/manifest.json" in said
    if where != "manifest.json":
        (folder / where).rename("aside")
    assert pasted(capsys, remedy).code == 0
    assert Ran(capsys, "build", "few", "--check").code == 0


def test_manifests_of_others_are_passed_over(
    capsys: pytest.CaptureFixture[str], spec: Path
) -> None:
    assert Ran(capsys, "build", str(spec)).code == 0
    for name, text in (("site", '{"name": "a web site"}'), (".hidden", "{}"), ("broken", "{")):
        Path("generated", name).mkdir()
        Path("generated", name, "manifest.json").write_text(text)
    assert "broken" not in Ran(capsys, "doctor").out


def test_a_projects_own_spec_is_found_from_below_and_goes_before_the_shipped_one(
    one_op: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = one_op / "specs" / "tiny.yaml"
    own.parent.mkdir()
    own.write_text(SPEC.replace("DTYPE", "float32"))
    (one_op / "pyproject.toml").touch()
    (one_op / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(one_op / "deep" / "er")
    with caplog.at_level("INFO", "nsagen.spec"):
        assert load_spec("tiny").source.samefile(own)
    assert caplog.messages == [f"spec tiny: {own}, not the shipped one"]
    assert load_spec(specs_dir() / "tiny.yaml").build_command() == (
        f"nsagen build {specs_dir() / 'tiny.yaml'}"
    )


def test_records_of_a_spec_in_a_wheel_go_to_the_users_project(
    one_op: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = one_op / "site-packages" / "nsagen" / "_specs"
    wheel.mkdir(parents=True)
    (wheel / "few.yaml").write_text(SPEC.replace("DTYPE", "float32"))
    monkeypatch.setattr(loading, "specs_dir", lambda: wheel)
    (one_op / "few.yaml").unlink()
    spec = load_spec("few")
    assert spec.tuned_folder == Path.cwd() / "specs" / "tuned" / "few"
    assert spec.shipped_tuned == wheel / "tuned" / "few"


@pytest.mark.parametrize("kept", [True, False])
def test_a_projects_records_of_a_spec_in_a_wheel_are_found_from_below(
    one_op: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    wheel = one_op / "site-packages" / "nsagen" / "_specs"
    wheel.mkdir(parents=True)
    (one_op / "few.yaml").rename(wheel / "few.yaml")
    monkeypatch.setattr(loading, "specs_dir", lambda: wheel)
    (one_op / "pyproject.toml").touch()
    records = one_op / "specs" / "tuned" / "few"
    if kept:
        records.mkdir(parents=True)
    (one_op / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(one_op / "deep" / "er")
    assert load_spec("few").tuned_folder == records


def test_doctor_recommends_to_remove_kernels_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the cache may be one that holds the user's own, too."""
    root = tmp_path / "it's mine"
    monkeypatch.setenv("NSAGEN_CACHE_DIR", os.path.relpath(root))
    for place in (cache_folder(), root / "0.0.5-deadbeef"):  # as today's calls name their targets
        (place / "cuda-90-triton-3.6").mkdir(parents=True)
        (place / "cuda-90-triton-3.6" / "x.py").touch()
    newer = root / "0.0.5-deadbeef"
    old = root / "0.0.1-deadbeef" / "cuda-80" / "x.py"
    for path in (
        old,
        root / "my-research" / "notes.txt",
        root / "0.0.2-deadbeef" / "notes.txt",
        root / "0.0.3-deadbeef" / "cuda-80" / "notes.txt",
    ):
        path.parent.mkdir(parents=True)
        path.touch()
    (root / "0.0.4-deadbeef").symlink_to(root / "my-research")
    notes: list[str] = []
    assert doctor._cache_use(notes, []) == "1 kernel of this version"
    (note,) = notes
    assert note.endswith("to remove them, run: nsagen doctor --prune")
    assert doctor.prune().startswith("removed 2 kernels of other versions from ")
    assert not newer.exists()
    assert sorted(path.name for path in root.glob("0.0.*")) == [
        "0.0.2-deadbeef",
        "0.0.3-deadbeef",
        "0.0.4-deadbeef",
    ]
