"""The commands on specs of the family's other members: what they take, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsagen.cases.verify import not_interpreted
from nsagen.cli.app import main
from nsagen.codegen.plan import plan_variants
from nsagen.spec import load_spec

SPEC = """
name: NAME
attention: {head_dim: 16, gqa_ratio: 2, dtype: float32, compress_type: avgpool, topk: 3,
  kernel_size: SIZE, kernel_stride: SIZE, block_size: 16, init_blocks: 0, local_blocks: 1,
  window_size: 0, with_pe: false, FORM}
branches: selected
targets: ["cuda:90"]
"""
INDEX = "scorer: index, index_heads: 2, index_head_dim: 16, score_norm: none, score_heads: each"
MEMBERS = {
    "index": (1, f"{INDEX}, score_pool: max"),
    "pooled": (8, "score_pool: max, pool_rope: after"),
}


@pytest.fixture(params=MEMBERS)
def spec(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    size, form = MEMBERS[request.param]
    text = SPEC.replace("NAME", request.param).replace("SIZE", str(size)).replace("FORM", form)
    Path(f"{request.param}.yaml").write_text(text)
    return f"{request.param}.yaml"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_build_and_check(spec: str) -> None:
    assert run("build", spec) == 0
    assert run("build", spec, "--check") == 0


@pytest.mark.interpreter
def test_verify(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoding alone, which is the quickest."""
    path = Path(spec)
    path.write_text(path.read_text() + "passes: [decode]\n")
    assert run("verify", spec, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["result"] for row in rows} == {"ok"}
    assert {(row["op"], row["pass"]) for row in rows} == {
        (w.op, w.pass_) for w in load_spec(spec).workloads()
    }


@pytest.mark.parametrize("name", ["minimax_m3", "minicpm4", "minicpm_sala", "moba"])
def test_the_interpreter_verifies_all_kernels_but_gluons(name: str) -> None:
    """MoBA's blocks of 4096 tokens and the kernels of MiniCPM's local band too."""
    spec = load_spec(name)
    variants = plan_variants(spec.workloads(), spec.targets, together=spec.forced_once())
    assert {v.workload.op for v in variants} >= {"block_selection", "selected_attention"}
    for variant in variants:
        assert bool(not_interpreted(variant)) == (variant.triton is not None)


def test_pictures(spec: str) -> None:
    assert run("inspect", spec, "--html", "page.html") == 0
    page = Path("page.html").read_text()
    ranking = "a learned index" if spec == "index.yaml" else "the compressed attention's maximum"
    assert f"the rest by {ranking}" in page.replace("&#x27;", "'")


def test_plan(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", spec, "--json") == 0
    member, dense = json.loads(capsys.readouterr().out)["models"]
    assert member["attention"].startswith(Path(spec).stem)
    assert member["cache"] > dense["cache"]  # index keys, or means of keys
    assert member["decode"] < dense["decode"]
    assert run("plan", spec) == 0
    assert "no parallel plans" in capsys.readouterr().out
    assert run("plan", spec, "--cache-dtype", "int8", "--json") == 0
    narrow = json.loads(capsys.readouterr().out)["models"][0]
    assert 0.5 < narrow["cache"] / member["cache"] < 0.7  # heads of 16 beside a scale
