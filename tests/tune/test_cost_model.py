"""The static objective: from spec to built package with no GPU, by what binaries use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsagen.cli.app import main
from nsagen.codegen.tuned import tuned_schedules
from nsagen.core.target import KNOWN_TARGETS
from nsagen.spec import load_spec
from nsagen.tune.cost import resident_programs, static_cost

H100 = KNOWN_TARGETS["cuda:90"]
KERNEL = {
    "registers": 64,
    "spill_bytes": 0,
    "shared_bytes": 16 * 1024,
    "matrix": "wgmma",
    "programs": 132 * 64,
    "num_warps": 4,
    "num_stages": 3,
}


@pytest.mark.parametrize(
    "worse",
    [
        {"spill_bytes": 32},
        {"matrix": "mma.sync"},
        {"matrix": "none"},
        {"registers": 250},
        {"shared_bytes": 200 * 1024},
        {"num_stages": 1},
        {"programs": 132 + 1, "shared_bytes": 200 * 1024},
    ],
)
def test_what_costs(worse: dict[str, object]) -> None:
    assert static_cost([{**KERNEL, **worse}], H100) > static_cost([KERNEL], H100)
    assert static_cost([KERNEL, KERNEL], H100) == 2 * static_cost([KERNEL], H100)


def test_helpers_do_not_drown_the_kernel_that_they_help() -> None:
    """One program that plans for all has a last wave as bad as can be, and takes no time."""
    helper = {**KERNEL, "matrix": "none", "programs": 1}
    assert static_cost([helper, KERNEL], H100) == static_cost([KERNEL], H100)
    assert static_cost([helper], H100) > 100 * static_cost([KERNEL], H100)


@pytest.mark.parametrize(
    ("kernel", "programs"),
    [
        ({"registers": 255}, 2),
        ({"registers": 64, "shared_bytes": 0}, 8),
        ({"registers": 16, "shared_bytes": 0}, 16),
        ({"registers": 16, "shared_bytes": 0, "num_warps": 1}, 32),
        ({"shared_bytes": 227 * 1024}, 1),
    ],
)
def test_resident_programs(kernel: dict[str, int], programs: int) -> None:
    assert resident_programs({**KERNEL, **kernel}, H100) == programs


def test_from_spec_to_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real compilation of a few schedules of the tiny spec, for a target not in this machine."""
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    arguments = "tune tiny --op gated_sum --pass forward --objective static --target cuda:80"
    arguments += f" --seqlens 4096 --trials 3 --jobs 1 --json --out {tmp_path} --report"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "static-cuda-80"
    assert [record["objective"] for record in found["records"]] == ["static"] * 2
    assert all(record["measured"] == 3 for record in found["records"])
    spec = load_spec("tiny")
    tuned = tuned_schedules([tmp_path / "tiny"], spec.workloads(), spec.targets)
    (note,) = tuned.notes
    assert note.startswith("not measured on a GPU but ranked by compile-time resources: 2 of 2 ")
    assert {(c.target, c.measured) for c in tuned.choices} == {("cuda:80", False)}
    assert {c.provenance for c in tuned.choices} == {
        "ranked by compile-time resources for cuda-80; not run"
    }
    page = (tmp_path / "tune-static-cuda-80.html").read_text()
    assert "gated_sum forward" in page


def test_forced_blocks_once_have_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real compilation of two defaults: calls on Hopper run these in place of whole lists."""
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    arguments = "tune llama8b --op selected_attention --op sliding_window_attention --pass forward"
    arguments += " --param gqa_ratio=16 --param local_blocks=2 --seqlens 4096 --trials 1 --json"
    arguments += f" --objective static --target cuda:90 --out {tmp_path} --jobs 1"
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert not end.value.code
    assert len(json.loads(capsys.readouterr().out)["records"]) == 2
    spec = load_spec("llama8b")
    forced = [w for group in spec.forced_once() for w in group if w.gqa_ratio == 16]
    tuned = tuned_schedules([tmp_path / "llama8b"], forced, spec.targets)
    assert sorted(choice.workload for choice in tuned.choices) == sorted(forced)
