"""Which Triton is installed, whatever its wheel is called."""

import importlib.metadata
import os
import time
from pathlib import Path

import pytest
import triton

from nsagen.cli.app import main
from nsagen.core import installed


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize(
    ("named", "told"),
    [
        (None, "{own}"),
        ("{own}", "{own}"),
        ("{own}+git12ab", "{own}+git12ab"),
        ("3.5.9", "{own} (distribution 3.5.9)"),
    ],
)
def test_the_version(
    monkeypatch: pytest.MonkeyPatch, named: str | None, told: str, loaded: bool
) -> None:
    own = triton.__version__

    def version(name: str) -> str:
        if named is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return named.format(own=own)

    monkeypatch.setattr(importlib.metadata, "version", version)
    if not loaded:
        modules = {k: v for k, v in installed.sys.modules.items() if k != "triton"}
        monkeypatch.setattr(installed.sys, "modules", modules)
    assert installed.triton_version() == told.format(own=own)


def test_none_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "own_triton_version", lambda: None)
    assert installed.triton_version() is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("570.124.06\\n570.124.06\\n", "570.124.06"),
        ("NVIDIA-SMI has failed: 570.1\\n", None),
        ("\\377\\376\\n", None),
        ("", None),
    ],
)
def test_what_is_no_version_of_a_driver_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: str | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert installed.driver_version() == told


def test_a_tool_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nvidia-smi does when the driver is broken."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(installed, "DRIVER_S", 1.0)
    problems: list[str] = []
    assert installed.driver_version(problems) is None
    assert problems[0].startswith("nvidia-smi did not answer within 1 s; ")
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("tune tiny", "scipy", "tune"),
        ("tune tiny --report --objective static", "plotly", "plot"),
        ("bench plot results.json", "matplotlib", "plot"),
        ("generate --model folder --prompt text", "tokenizers", "transformers"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    missing: str,
    extra: str,
) -> None:
    find = installed.importlib.util.find_spec
    monkeypatch.setattr(
        installed.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"got no {missing}; run: pip install 'nsagen[{extra}]'" in said
