"""The runs under a sanitizer are counted and summed up; a program of the tests stands in for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = """\
#!{python}
import subprocess, sys
at = sys.argv.index({python!r})
code = subprocess.run(sys.argv[at:]).returncode
errors = {errors}
print(f"========= ERROR SUMMARY: {{errors}} errors")
sys.exit(code or min(errors, 1))
"""


def sanitize(folder: Path, *tests: str, errors: int = 0) -> subprocess.CompletedProcess[str]:
    fake, names = folder / "sanitizer", folder / "list.txt"
    fake.write_text(FAKE.format(python=sys.executable, errors=errors))
    fake.chmod(0o755)
    names.write_text("\n".join(tests) + "\n")
    command = [sys.executable, "tests/sanitize.py", "--sanitizer", str(fake), "--list", str(names)]
    return subprocess.run(
        [*command, "--jobs", "2"], cwd=ROOT, text=True, capture_output=True, check=False
    )


@pytest.fixture
def passing(tmp_path: Path) -> str:
    path = tmp_path / "test_passing.py"
    path.write_text("def test_one(): pass\ndef test_two(): pass\n")
    return str(path)


@pytest.fixture
def failing(tmp_path: Path) -> str:
    path = tmp_path / "test_failing.py"
    path.write_text("def test_three(): assert 1 == 2\n")
    return str(path)


def test_each_tool_is_summed_up(tmp_path: Path, passing: str) -> None:
    done = sanitize(tmp_path, passing, passing)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    summary = ": 4 passed; 0 errors reported; 0 of 2 lists failed; "
    ends = [line.partition(summary)[0] for line in lines if summary in line]
    assert ends == ["memcheck", "racecheck"]
    each = [line for line in lines if f"{passing}: 2 passed; 0 errors reported; " in line]
    assert len(each) == len(lines) - 2 == 4


def test_a_failing_test_is_shown(tmp_path: Path, passing: str, failing: str) -> None:
    done = sanitize(tmp_path, passing, failing)
    assert done.returncode == 1
    assert "assert 1 == 2" in done.stdout
    assert "memcheck: 2 passed, 1 failed; 0 errors reported; 1 of 2 lists failed" in done.stdout


def test_what_the_sanitizer_reports_fails(tmp_path: Path, passing: str) -> None:
    done = sanitize(tmp_path, passing, errors=3)
    assert done.returncode == 1
    assert "memcheck: 2 passed; 3 errors reported; 1 of 1 lists failed" in done.stdout


def test_every_line_of_the_list_is_there() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "@tests/kernels/sanitize.txt"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
