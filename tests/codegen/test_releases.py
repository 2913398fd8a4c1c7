"""What a build writes does not depend on Triton; what runs here does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsagen.aot import variants as compiling
from nsagen.cases import verify
from nsagen.codegen.build import build, choose_variants
from nsagen.codegen.plan import Variant, plan_variants
from nsagen.codegen.record_folders import RecordFolders
from nsagen.codegen.template import default_schedule, render, spaces_of
from nsagen.core.bucket import Bucket
from nsagen.core.releases import Releases
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import FORCED_ONCE, STATIC_PARAMS, Workload
from nsagen.spec import load_spec
from nsagen.tune import encoding

SM90 = KNOWN_TARGETS["cuda:90"]
SLIDING = Workload.of(
    "sliding_window_attention",
    "forward",
    dtype="bfloat16",
    head_dim=128,
    v_head_dim=128,
    gqa_ratio=16,
    window_size=512,
)

SPEC = """
name: hopper
attention: {head_dim: 128, gqa_ratio: 16, dtype: bfloat16, compress_type: avgpool, kernel_size: 32,
  kernel_stride: 16, block_size: 64, topk: 16, window_size: 512}
passes: [forward]
targets: ["cuda:90"]
"""

HIDDEN = "sys.modules['triton'] = None"
NEWER = "triton = sys.modules['triton'] = types.ModuleType('triton'); triton.__version__ = '9.1.0'"
CODE = """
import sys, types; from pathlib import Path
{what}
from nsagen.codegen.build import build, check; from nsagen.spec import load_spec
spec = load_spec(sys.argv[1])
build(spec, Path(sys.argv[2]))
assert check(spec, Path(sys.argv[2])) == []
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("what", [HIDDEN, NEWER], ids=["hidden", "newer"])
def test_a_build_writes_the_same_bytes_whichever_triton_there_is(what: str, tmp_path: Path) -> None:
    path = tmp_path / "hopper.yaml"
    path.write_text(SPEC)
    command = [sys.executable, "-c", CODE.format(what=what), str(path), str(tmp_path / "other")]
    subprocess.run(command, check=True, cwd=tmp_path)
    build(load_spec(path), tmp_path / "here")
    assert contents(tmp_path / "other") == contents(tmp_path / "here")
    assert b"Releases((3, 6), (3, 9))" in contents(tmp_path / "here")["hopper/dispatcher.py"]


def planned() -> tuple[Variant, Variant]:
    """For particular releases of Triton, and for all."""
    one, other = sorted(plan_variants([SLIDING], ["cuda:90"]), key=lambda v: v.triton is None)
    return one, other


def test_a_table_has_a_kernel_for_every_triton() -> None:
    one, other = planned()
    assert (one.schedule.algorithm, one.triton) == ("warp_specialized", Releases((3, 6), (3, 9)))
    assert other.triton is None
    assert [use.bucket for use in (*one.uses, *other.uses)] == [Bucket(), Bucket()]
    assert other.uses[0].provenance == "for Triton outside 3.6 to 3.9; not measured"
    (alone,) = plan_variants([SLIDING], ["cuda:80"])
    assert alone.triton is None


def test_a_kernel_refuses_the_releases_that_its_space_does_not_name() -> None:
    for op, pass_ in STATIC_PARAMS:
        for space in spaces_of(op, pass_):
            template = (Path(__file__).parents[2] / "templates" / space.template).read_text()
            assert ("gluon" in template) == (space.triton is not None), space.template
    one, _ = planned()
    source = render(one.workload, one.schedule, "")
    assert "if not (3, 6) <= " in source
    assert "this kernel needs Triton 3.6 to 3.9; got" in source


@pytest.mark.parametrize("release", [(3, 5), (3, 10), (4, 0)])
def test_what_runs_here_needs_the_installed_triton(
    release: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = planned()
    assert default_schedule(SLIDING, SM90) == one.schedule
    assert default_schedule(SLIDING, SM90, (3, 6)) == one.schedule
    assert default_schedule(SLIDING, SM90, release) == other.schedule
    for module in (encoding, compiling):
        monkeypatch.setattr(module, "installed_release", lambda: release)
    searched = encoding.valid_schedules(SLIDING, SM90)
    assert one.schedule.algorithm not in {schedule.algorithm for schedule in searched}
    assert compiling.compile_variants(tmp_path, (one,)) == {}
    monkeypatch.setattr(verify, "installed_release", lambda: release)
    (row,) = verify._verified(
        one, tmp_path / "none.py", torch.device("cuda"), topk=16, seed=0, ran={}
    )
    assert (row["result"], row["note"].partition(";")[0]) == ("skipped", "needs Triton 3.6 to 3.9")


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ("gqa_ratio: 16", True),
        ("gqa_ratio: 4", False),  # reads its blocks key-major, over whole lists
        ("gqa_ratio: 16, local_blocks: 0", False),
        ("gqa_ratio: 16, branch_kv: separate", False),
        ("gqa_ratio: 12", False),  # does not fill the tile of the window's pipeline
    ],
)
def test_kernels_that_meet_forced_blocks_once(change: str, made: bool, tmp_path: Path) -> None:
    """Both or none of them, and on Hopper alone."""
    text = SPEC.replace("gqa_ratio: 16", change).replace('["cuda:90"]', '["cuda:80", "cuda:90"]')
    path = tmp_path / "hopper.yaml"
    path.write_text(text)
    variants, _ = choose_variants(load_spec(path), RecordFolders(()))
    found = [v for v in variants if v.workload.named().get("local_blocks") and is_forced(v)]
    assert {v.workload.op for v in found} == ({op for op, _ in FORCED_ONCE} if made else set())
    assert {target for v in found for target in v.targets} == ({"cuda:90"} if made else set())


def is_forced(variant: Variant) -> bool:
    return (variant.workload.op, variant.workload.pass_) in FORCED_ONCE
