"""A build: the same bytes everywhere, in no time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from nsagen.codegen.build import build, check
from nsagen.spec import load_spec


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Sets and dictionaries are hashed differently in each."""
    code = (
        "import sys; from pathlib import Path; from nsagen.codegen.build import build;"
        "from nsagen.spec import load_spec; build(load_spec('tiny'), Path(sys.argv[1]))"
    )
    for name in ("one", "other"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert one == other
    assert len(one) > 100


def test_rendering_llama8b_takes_less_than_three_seconds(tmp_path: Path) -> None:
    """Of one core: what else a machine does is not the build's."""
    started = time.process_time()
    result = build(load_spec("llama8b"), tmp_path)
    assert time.process_time() - started < 3
    assert len(result.variants) > 50
    assert check(load_spec("llama8b"), tmp_path) == []
