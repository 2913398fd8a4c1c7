"""Closed standard streams, pipes without a reader and full disks end commands in words."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nsagen.cli.console import print_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("redirection", "codes"),
    [("<&- >&- 2>&-", {0}), (">/dev/full", {1}), ("| true; exit ${PIPESTATUS[0]}", {0, 1, 141})],
)
@pytest.mark.parametrize("arguments", ["inspect --schema", "--version"], ids=["long", "short"])
def test_streams_that_do_not_work(
    arguments: str, redirection: str, codes: set[int], tmp_path: Path
) -> None:
    """A short text waits in a buffer: Python writes it when the command is over."""
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    line = f'"{sys.executable}" -m nsagen {arguments} {redirection}'
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


@pytest.mark.parametrize("stream", ["2>/dev/full", "2</dev/null"])
def test_notes_and_errors_that_cannot_be_shown_change_no_exit_code(
    stream: str, tmp_path: Path
) -> None:
    if "/dev/full" in stream and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    for arguments, code in (("--verbose inspect --schema", 0), ("inspect nowhere", 2)):
        done = subprocess.run(
            ["bash", "-c", f'"{sys.executable}" -m nsagen {arguments} {stream}'],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == code


def test_a_working_folder_that_was_removed(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["bash", "-c", f'rmdir "$PWD"; "{sys.executable}" -P -m nsagen doctor'],
        cwd=tmp_path / "gone",
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("nsagen: the working folder must exist")


def test_a_command_with_odd_characters_is_shown_on_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_line("run: nsagen build 'a[b].yaml' --out $'a\\tb'")
    print_line("in a\tb\x1b[2J")
    assert capsys.readouterr().out == (
        "run: nsagen build 'a[b].yaml' --out $'a\\tb'\nin a\\tb\\x1b[2J\n"
    )


def test_ctrl_c_while_the_command_line_is_imported_ends_in_silence(tmp_path: Path) -> None:
    code = """
import os, signal, sys
class Press:
    def find_spec(name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
from nsagen.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGINT
    assert (done.stdout, done.stderr) == (b"", b"")
