"""A build: the same bytes everywhere, in no time."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nsagen.codegen.build import build, check
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.packages import read_manifest
from nsagen.core.target import KNOWN_TARGETS
from nsagen.spec import load_spec
from tests.bad.support import contents

GENERATED = Path(__file__).parents[2] / "generated"


@pytest.mark.parametrize("name", ["llama8b", "tiny"])
def test_a_committed_package_has_the_files_that_its_manifest_lists(name: str) -> None:
    """A build keeps files that no manifest lists, and a merge of manifests can leave such files."""
    folder = GENERATED / name
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    assert found == read_manifest(folder)["files"].keys()


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Sets and dictionaries are hashed differently in each."""
    code = (
        "import sys; from pathlib import Path; from nsagen.codegen.build import build;"
        "from nsagen.spec import load_spec; build(load_spec('tiny'), Path(sys.argv[1]))"
    )
    for name in ("one", "other"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one == other
    assert len(one) > 100


def test_rendering_llama8b_takes_less_than_three_seconds(tmp_path: Path) -> None:
    """Of one core: what else a machine does is not the build's."""
    started = time.process_time()
    result = build(load_spec("llama8b"), tmp_path)
    assert time.process_time() - started < 3
    assert len(result.variants) > 50
    assert check(load_spec("llama8b"), tmp_path) == []


def test_what_cannot_launch_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the memory formula of its space: the workload, the bytes, the target and what it has."""
    small = dataclasses.replace(KNOWN_TARGETS["cuda:80"], shared_memory=2048)
    monkeypatch.setitem(KNOWN_TARGETS, "cuda:80", small)
    said = (
        r"block_selection forward f16_d32_g1_\w+, cuda:80: .*"
        r"needs about \d+ bytes of shared memory, cuda:80 has 2048"
    )
    with pytest.raises(UnsupportedWorkloadError, match=said):
        build(load_spec("tiny"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
