"""What is shipped, what is trusted, and that no data is ever run."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("nsagen", "templates", "examples", "benchmarks", "docs")


OWN_TEXT = "nsagen/runtime/replay.py"
"""Writes a repeated call out as a function: numbers of places and constants, nothing that it read.
tests/runtime/test_replay.py looks at the text."""


def code() -> list[Path]:
    """Every Python file of the project but its tests and what it generates."""
    return sorted(path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py"))


def dangers(path: Path) -> Iterator[str]:
    """Lines that could run what they read."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in _imported(node):
            if name.partition(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal"):
                yield f"{path}:{node.lineno}: imports {name}"  # type: ignore[attr-defined]
            if name.partition(".")[0] in ("shelve", "joblib"):
                yield f"{path}:{node.lineno}: imports {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            for what in _dangerous_call(node):
                yield f"{path}:{node.lineno}: {what}"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def _dangerous_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        yield f"calls {called}"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if called.endswith(("yaml.load", "yaml.parse", "yaml.compose")):
        loader = given.get("Loader", "")
        if loader not in ("yaml.SafeLoader", "_Loader", "loader"):  # the latter are safe ones' own
            yield f"{called} with Loader={loader}"
    if re.search(r"(unsafe|full)_load$", called) or "allow_pickle" in given:
        yield f"calls {called}"
    if given.get("shell") == "True":
        yield f"{called} with a shell"


def test_no_code_runs_what_it_reads() -> None:
    assert len(code()) > 100
    others = [path for path in code() if path != ROOT / OWN_TEXT]
    assert [danger for path in others for danger in dangers(path)] == []
    own = [danger.rpartition(": ")[2] for danger in dangers(ROOT / OWN_TEXT)]
    assert own == ["calls exec", "calls compile"]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_search_finds(line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(line)
    assert len(list(dangers(tmp_path / "bad.py"))) == 1


LOAD = """
import sys
from pathlib import Path
import torch
from nsagen.core.errors import InvalidInputError
from nsagen.model import ToyLlama
from tests.model.tiny import dense_config

folder = Path(sys.argv[1])
ToyLlama(dense_config(num_hidden_layers=1, vocab_size=64)).save_pretrained(folder / "good")
ToyLlama.from_pretrained(folder / "good")  # imports what it needs
(folder / "bad").mkdir()
(folder / "good" / "config.json").rename(folder / "bad" / "config.json")
torch.save({"x": torch.ones(1)}, folder / "bad" / "pytorch_model.bin")
(folder / "good" / "config.json").write_bytes((folder / "bad" / "config.json").read_bytes())
opened = []

def watch(event, arguments):
    if event == "open":
        opened.append(str(arguments[0]))
    if event.startswith(("pickle.", "marshal.", "exec", "compile", "os.system", "subprocess.")):
        raise RuntimeError(f"{event} {arguments}")

def refuse(*arguments, **more):
    raise RuntimeError("torch.load")

torch.load = refuse
sys.addaudithook(watch)
ToyLlama.from_pretrained(folder / "good")
try:
    ToyLlama.from_pretrained(folder / "bad")
except InvalidInputError as error:
    print(error)
print(sum(path.endswith("config.json") for path in opened), "configs")
print(sum(path.endswith(".bin") for path in opened), "pickles")
"""


def test_checkpoints_load_through_safetensors_only(tmp_path: Path) -> None:
    """An audit hook stops whatever unpickles, compiles or runs; no .bin is even opened."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error, *counts = done.stdout.splitlines()
    assert "pytorch_model.bin may hold code" in error
    assert counts == ["2 configs", "0 pickles"]


def test_each_dependency_says_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.partition("\ndependencies = [\n")[2].partition("\n]")[0].splitlines()
    assert 10 <= len(listed) <= 15
    assert [line for line in listed if "  # " not in line] == []


def built(source: Path, out: Path, *targets: str) -> dict[str, str]:
    """Name -> SHA-256 of what hatchling makes of a tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    for target in targets:
        command += ["-t", target]
    subprocess.run(command, check=True, cwd=source, capture_output=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What hatchling reads of the project, copied so that a test may change it."""
    folder = tmp_path_factory.mktemp("source") / "nsagen"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "generated", "results", "site", "__pycache__", ".*_cache", "*.egg-info"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def test_what_is_built_twice_is_the_same(tree: Path, tmp_path: Path) -> None:
    """From trees of other times, modes and leftovers; and the sdist builds the same wheel."""
    pytest.importorskip("hatchling")
    first = built(tree, tmp_path / "first", "wheel", "sdist")
    for path in tree.rglob("*"):
        os.utime(path, (1e9, 1e9))
        if path.is_file():
            path.chmod(0o600)
    for folder in ("nsagen", "templates/rope", "specs"):
        (tree / folder / "__pycache__").mkdir(exist_ok=True)
        (tree / folder / "__pycache__" / "old.cpython-311.pyc").write_bytes(b"left over")
    second = built(tree, tmp_path / "second", "wheel", "sdist")
    assert first == second
    (archive,) = (tmp_path / "first").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = built(unpacked, tmp_path / "third", "wheel")
    assert again.items() <= first.items()
    for needed in ("tests/conftest.py", "constraints.txt", "Makefile", "docs/spec.md", "LICENSE"):
        assert (unpacked / needed).is_file()


def test_nothing_strange_is_in_the_wheel(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    built(tree, tmp_path, "wheel")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    allowed = re.compile(r".*\.(py|j2|yaml|json|css|js|typed|xz)|.*\.dist-info/.*")
    assert [name for name in names if not allowed.fullmatch(name)] == []
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_the_wheel_builds_kernels_in_an_empty_environment(tree: Path, tmp_path: Path) -> None:
    """nsagen comes from the wheel alone; what it depends on, from where the tests run."""
    built(tree, tmp_path / "wheel", "wheel")
    (wheel,) = (tmp_path / "wheel").iterdir()
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NSAGEN", "PIP"))}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"  # ruff is a program

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # A path file of another folder adds its packages without following their own path files,
    # through which a checkout of nsagen could come.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others))
    assert run(python, "-c", "import nsagen; print(nsagen.__file__)").startswith(str(packages))
    nsagen = tmp_path / "venv" / "bin" / "nsagen"
    assert "kernels in generated/tiny" in run(nsagen, "build", "tiny")
    assert "up to date" in run(nsagen, "build", "tiny", "--check")
    shown = run(python, "-c", "import nsagen; print(nsagen.load('tiny'))")
    assert shown.startswith("Dispatcher('tiny', ")
