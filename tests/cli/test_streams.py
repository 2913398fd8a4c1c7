"""Closed standard streams, pipes without a reader and full disks end commands in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("redirection", "codes"),
    [("<&- >&- 2>&-", {0}), (">/dev/full", {1}), ("| true; exit ${PIPESTATUS[0]}", {0, 1, 141})],
)
def test_streams_that_do_not_work(redirection: str, codes: set[int], tmp_path: Path) -> None:
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    line = f'"{sys.executable}" -m nsagen inspect --schema {redirection}'
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode in codes, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_text_that_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    code = "from nsagen.cli.app import _open_streams as o; o(); print(chr(0x2603), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (rb"\u2603", b"")
