"""What is installed: resources are found, the run-time side stays light, the wheel is whole."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nsagen import __version__
from nsagen.core.paths import specs_dir, templates_dir

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

GENERATING_ONLY = {"jinja2", "yaml", "pydantic", "optuna", "typer", "rich", "transformers"}


def test_resources_are_found_beside_the_package() -> None:
    assert (templates_dir() / "shared").is_dir()
    assert (specs_dir() / "tiny.yaml").is_file()


def test_the_lowest_releases_are_those_that_pyproject_allows() -> None:
    """`make test-lowest` installs lowest.txt."""
    project = PROJECT["project"]
    dependencies = (*project["dependencies"], *project["optional-dependencies"]["tune"])
    bounds = {text.partition(";")[0].replace(">=", "==").strip() for text in dependencies}
    lines = (ROOT / "lowest.txt").read_text().splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == bounds


def test_every_requirement_is_pinned_by_the_constraints() -> None:
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = itertools.chain(PROJECT["project"]["dependencies"], *extras)
    names = {re.split(r"[\[<>=;! ]", requirement)[0].lower() for requirement in wanted}
    assert names - {"nsagen"} <= pinned  # the extra dev takes the others in


def test_the_changelog_has_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("module", ["nsagen", "nsagen.runtime", "nsagen.ops", "nsagen.model"])
def test_the_running_side_imports_nothing_of_the_generating_side(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({GENERATING_ONLY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_wheel_has_templates_and_specs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("nsagen-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("templates", "specs"):
        shipped = {
            f"nsagen/_{folder}/{path.relative_to(ROOT / folder).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        assert shipped <= names
    assert not any(name.startswith(("tests/", "generated/")) for name in names)
