"""tests/forks.py: tests in forked processes have the outcomes that they have in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.forks import Shares

TESTS = """
import os, signal, sys, tempfile, warnings
import pytest

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")

@pytest.mark.parametrize("n", range(40))
def test_passes(n, made, tmp_path):
    assert made.is_dir() and tmp_path.is_dir() and not list(tmp_path.iterdir())
    (tmp_path / "own").touch()
    tempfile.mkstemp()

def test_fails():
    print("what it prints")
    assert [1, 2] == [1, 3]

def test_skips():
    pytest.skip("why")

@pytest.mark.xfail
def test_expects_to_fail():
    raise ValueError

@pytest.fixture
def broken():
    raise ValueError("in a fixture")

def test_needs_it(broken):
    pass

def test_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def test_exits():
    os._exit(3)

def test_warns():
    warnings.warn("beware", FutureWarning)

def test_is_the_last():
    pass
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_few.py").write_text(TESTS)
    (folder / "temporary").mkdir()
    root = Path(__file__).parents[1]
    names = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(folder / "temporary")}
    names.pop("PYTEST_ADDOPTS", None)
    few = ["-p", "no:hypothesispytest", "-p", "no:anyio", "-p", "no:xdist", "-p", "tests.forks"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *few, *args, "test_few.py"],
        cwd=folder,
        env=names,
        capture_output=True,
        text=True,
    )


def test_outcomes(tmp_path: Path) -> None:
    done = run(tmp_path, "--forks", "3")
    assert "4 failed" not in done.stdout
    assert "3 failed, 42 passed, 1 skipped, 1 xfailed, 1 warning, 1 error" in done.stdout
    assert done.returncode == 1
    for text in ("what it prints", "At index 1 diff: 2 != 3", "in a fixture", "ended with 3"):
        assert text in done.stdout
    assert "killed by signal 9" in done.stdout
    assert "FutureWarning: beware" in done.stdout
    left = [p.name for p in (tmp_path / "temporary").iterdir() if not p.name.startswith("pytest-")]
    assert not left


def test_it_stops_after_failures(tmp_path: Path) -> None:
    done = run(tmp_path, "--forks", "1", "-x", "-k", "fails or skips or last")
    assert "1 failed" in done.stdout
    assert "passed" not in done.stdout
    assert done.returncode == 1


def test_passing_tests_pass(tmp_path: Path) -> None:
    done = run(tmp_path, "--forks", "auto", "-k", "passes")
    assert "40 passed" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_test_is_taken_once() -> None:
    """By whichever process; one that has none left takes half of what another has."""
    shares = Shares(10, 3)
    assert [shares.take(0) for _ in range(4)] == [0, 1, 2, 8]
    assert [shares.take(1) for _ in range(4)] == [3, 4, 5, 7]
    assert [shares.take(2) for _ in range(3)] == [6, 9, None]
    shares = Shares(5, 2)
    shares.drop()
    assert shares.take(0) is None
