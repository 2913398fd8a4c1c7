"""An exported package: a wheel that runs where nothing but torch and triton is installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from nsagen.export.sources import needed_modules, with_relative_imports
from tests.export.small import INFLLM, NSA, exported

USE = """
import sys
import torch, triton

before = set(sys.modules)
import nsagen_small as small
from nsagen_small.runtime.dispatcher import lookup

random = torch.Generator().manual_seed(0)
tokens = [0, 25, 25, 30]  # one sequence is empty
draw = lambda *shape: torch.randn(*shape, generator=random)
q, k, v, gate = draw(30, 2, 16), draw(30, 1, 16), draw(30, 1, 16), torch.rand(30, 2, 3)
sizes = dict(compress_type="avgpool", kernel_size=8, kernel_stride=4, block_size=8, topk=3,
             window_size=12, cu_seqlens=torch.tensor(tokens, dtype=torch.int32))
launched = []
find = small.dispatcher.launcher
small.dispatcher.launcher = lambda *given: launched.append(given[0].op) or find(*given)
o = small.native_sparse_attention(q, k, v, gate, **sizes)
expected = small.reference.native_sparse_attention(
    q.double(), k.double(), v.double(), gate.double(), **sizes)
print("error", float((o - expected).norm() / expected.norm()))
print("ops", *sorted(set(launched)))
try:
    small.native_sparse_attention(q, k, v, gate, **{**sizes, "topk": 4})
except small.UnsupportedWorkloadError as error:
    print("missing", "topk: 4" in str(error), 'on_missing is "error"' in str(error))
try:
    building = small.dispatcher.with_on_missing("build")
    small.native_sparse_attention(q, k, v, gate, **{**sizes, "topk": 4}, dispatcher=building)
except small.UnsupportedWorkloadError as error:
    print("built", "an exported package has the kernels of its spec only" in str(error))
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print("imported", *sorted(new - sys.stdlib_module_names))
print("absent", all(name not in sys.modules for name in ("nsagen", "pydantic", "yaml", "optuna")))
"""

NEEDED = (
    "torch",
    "triton",
    "numpy",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "filelock",
)
NEEDED += ("fsspec", "jinja2", "markupsafe", "torchgen", "functorch", "numpy.libs", "setuptools")
"""What torch and triton themselves import, and numpy, which Triton's interpreter needs."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = exported(tmp_path_factory.mktemp("export"), NSA, "small")
    assert result.kernels > 5
    return result.folder


def bare_environment(folder: Path) -> tuple[Path, Path]:
    """The Python and site-packages of an environment with torch, triton and what they need."""
    venv.create(folder, symlinks=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for place in map(Path, sys.path):
        for name in NEEDED:
            if place.name == "site-packages" and (found := _module(place, name)):
                (packages / found.name).symlink_to(found)
    return folder / "bin" / "python", packages


def _module(place: Path, name: str) -> Path | None:
    found = [path for path in (place / name, place / f"{name}.py") if path.exists()]
    return found[0] if found else None


def test_the_wheel_runs_in_an_empty_environment(package: Path, tmp_path: Path) -> None:
    """Built by its own backend, installed by pip; the kernels run through Triton's interpreter."""
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, check=True, cwd=package, capture_output=True)
    (wheel,) = tmp_path.glob("nsagen_small-*.whl")
    python, packages = bare_environment(tmp_path / "venv")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    install += ["--no-compile", "--target", str(packages), str(wheel)]
    subprocess.run(install, check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NSAGEN"))}
    clean |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", USE], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert float(said["error"]) < 1e-5
    assert {"selected_attention", "block_selection", "compress"} <= set(said["ops"].split())
    assert said["missing"] == "True True"
    assert said["built"] == "True"
    assert set(said["imported"].split()) <= {"nsagen_small", "torch", "triton"}
    assert said["absent"] == "True"


def test_every_file_imports_torch_triton_and_its_own_package_only(package: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    files = sorted(package.rglob("*.py"))
    assert len(files) > 60
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_nothing_is_unused_or_undefined(package: Path) -> None:
    """As ruff sees it; what `__init__` files import is for others."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F"]
    command.append(str(package))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_same_spec_gives_the_same_bytes(package: Path, tmp_path: Path) -> None:
    again = exported(tmp_path, NSA, "small").folder
    for path in package.rglob("*"):
        if path.is_file() and path.name != "export.json":
            mine = (again / path.relative_to(package)).read_bytes()
            assert mine == path.read_bytes(), path


def test_what_only_other_layouts_need_stays_out() -> None:
    """No model, no command, no reader of specs; of the runtime, nothing that builds."""
    modules = needed_modules(["nsagen.ops"])
    rooms = {name.split(".")[1] for name in modules}
    assert rooms == {"core", "ops", "runtime"}
    assert "nsagen.core.paths" not in modules
    assert "nsagen.core.files" not in modules


@pytest.mark.parametrize(
    ("module", "line", "relative"),
    [
        ("nsagen.ops.rope", "from nsagen.ops import reference", "from . import reference"),
        ("nsagen.ops.rope", "from nsagen.ops._op import x", "from ._op import x"),
        ("nsagen.ops.rope", "from nsagen.core.errors import x", "from ..core.errors import x"),
        ("nsagen.ops", "from nsagen.ops.rope import rope", "from .rope import rope"),
        ("nsagen.ops.reference.rope", "from nsagen.runtime import x", "from ...runtime import x"),
        ("nsagen.dispatcher", "from nsagen.runtime import x", "from .runtime import x"),
        ("nsagen.ops.rope", "from nsagenda import x", "from nsagenda import x"),
        ("nsagen.ops.rope", "from torch import Tensor", "from torch import Tensor"),
    ],
)
def test_imports_become_relative(module: str, line: str, relative: str) -> None:
    assert with_relative_imports(line, module) == relative
    assert with_relative_imports(f"def f():\n    {line}\n", module) == f"def f():\n    {relative}\n"


def test_a_members_package_has_its_attention(tmp_path: Path) -> None:
    text = (exported(tmp_path, INFLLM, "member").folder / "nsagen_member/__init__.py").read_text()
    assert '"form": "infllm_v2"' in text
    assert '"dense_len": 0' in text
