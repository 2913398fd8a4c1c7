"""What must not ship fails by name when a package is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsagen.aot import cached, variants
from nsagen.aot.compile import recorded_launches
from nsagen.aot.resources import Resources
from nsagen.aot.variants import compile_variants
from nsagen.codegen.build import build
from nsagen.codegen.template import default_schedule, kernel_name, render
from nsagen.core.errors import BuildError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.spec import load_spec


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spill_bytes": 40, "loop_spills": 3}, "the stack 3 times in loops"),
        ({"shared_bytes": 1 << 20}, "shared memory"),
    ],
)
def test_what_must_not_ship_fails_by_name(
    changes: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = build(load_spec("tiny"), tmp_path).variants[0]
    target = variant.targets[0]
    good = Resources("k", target, 32, 0, 1024, "none")
    monkeypatch.setattr(variants, "map_in_workers", _here)
    monkeypatch.setattr(cached, "compiled_resources", lambda *_: (good,))
    assert compile_variants(tmp_path, (variant,))[variant.name]
    monkeypatch.setattr(cached, "compiled_resources", lambda *_: (replace(good, **changes),))
    with pytest.raises(BuildError, match=rf"{variant.name}: kernel k on {target}: .*{text}"):
        compile_variants(tmp_path, (variant,))


def _here(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *_: Any) -> Iterator[Any]:
    """Stands in for `map_in_workers`, in this process."""
    for arguments in calls:
        yield function(*arguments)


@pytest.mark.parametrize("name", ["minimax_m3", "minicpm4", "moba"])
def test_every_workload_of_the_family_has_a_launch_to_compile(name: str, tmp_path: Path) -> None:
    """MoBA's windows of 4096 tokens too, of which short example calls have none."""
    for workload in load_spec(name).workloads():
        schedule = default_schedule(workload, KNOWN_TARGETS["cuda:80"])
        path = tmp_path / f"{kernel_name(workload, schedule)}.py"
        path.write_text(render(workload, schedule, header="# test"))
        assert recorded_launches(path, workload)
