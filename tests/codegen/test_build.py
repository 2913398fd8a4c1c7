"""A build: the same bytes everywhere, in no time, and nothing in it that must not ship."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsagen.aot import cached as compiled
from nsagen.aot import variants as compiling
from nsagen.aot.resources import Resources
from nsagen.aot.variants import compile_variants
from nsagen.codegen.build import build, check
from nsagen.core.errors import BuildError
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


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"spill_bytes": 4000}, "spills 4000 bytes"), ({"shared_bytes": 1 << 20}, "shared memory")],
)
def test_what_must_not_ship_fails_by_name(
    changes: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = build(load_spec("tiny"), tmp_path).variants[0]
    target = variant.targets[0]
    good = Resources("k", target, 32, 0, 1024, "none")
    monkeypatch.setattr(compiling, "map_in_workers", _here)
    monkeypatch.setattr(compiled, "compiled_resources", lambda *_: (good,))
    assert compile_variants(tmp_path, (variant,))[variant.name]
    monkeypatch.setattr(compiled, "compiled_resources", lambda *_: (replace(good, **changes),))
    with pytest.raises(BuildError, match=rf"{variant.name}: kernel k on {target}: .*{text}"):
        compile_variants(tmp_path, (variant,))


def _here(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *_: Any) -> Iterator[Any]:
    """Stands in for `map_in_workers`, in this process."""
    for arguments in calls:
        yield function(*arguments)
