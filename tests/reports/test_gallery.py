"""The gallery: pages of specs and kernels that say what is known, and link to each other."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from nsagen.codegen.build import build
from nsagen.reports import gallery
from nsagen.reports.gallery import write_gallery
from nsagen.reports.target_support import Usage
from nsagen.spec import load_spec
from tests.one_op import one_op

__all__ = ["one_op"]  # a fixture


def test_every_kernel_has_a_page_and_every_link_a_file(
    one_op: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "inspection_page", lambda spec: f"<p>{spec.name}</p>")
    built = build(load_spec("few.yaml"), one_op / "generated")
    variant = built.variants[0]
    table = {(variant.name, variant.targets[0]): Usage(40, 8, 2048, "wgmma", 3, "", "3.9.0")}
    pages = list(write_gallery(one_op / "gallery", ["few.yaml"], [built.folder], table))
    assert set(pages) == {"few.yaml", "index", *(v.name for v in built.variants)}
    index = (one_op / "gallery" / "index.html").read_text()
    linked = set(re.findall(r'href="([^"]+)"', index))
    assert linked == {path.name for path in (one_op / "gallery").iterdir()} - {"index.html"}
    text = html.unescape((one_op / "gallery" / f"{variant.name}.html").read_text())
    assert "o = gate[..., 0] * o_compressed + gate[..., 1] * o_selected" in text
    (title_style,) = re.findall(r"^h1 \{(.*)\}", text, re.MULTILINE)
    assert "overflow-wrap: anywhere" in title_style  # a kernel's name is wider than a phone
    for fact in ("40", "8 B, 3 times in loops", "2,048 B", "wgmma", "3.9.0"):
        assert f"<td>{fact}</td>" in text


def test_a_measured_time_has_its_share_of_the_roofline() -> None:
    (workload,) = {w for w in load_spec("tiny").workloads() if w.op == "rope" and "f16" in w.label}
    said = "tuned on nvidia-h200: 0.5 ms at 1 x 4096 tokens, 8 kv heads; default 0.6 ms"
    q_and_y_ms = 1e3 * 2 * 4096 * 8 * 32 * 2 / 4.27e12
    share = float(gallery._share(workload, said).rstrip("%")) / 100
    assert share == pytest.approx(q_and_y_ms / 0.5, abs=0.01)
    assert gallery._share(workload, "the architecture's default; not measured") == ""


def test_a_share_counts_the_blocks_of_a_list() -> None:
    (workload,) = {
        w
        for w in load_spec("minicpm4").workloads()
        if (w.op, w.pass_) == ("selected_attention", "forward")
    }
    said = "tuned on nvidia-h200: 10 ms at 1 x 32768 tokens, 2 kv heads"
    few, many = (
        float(gallery._share(workload, said + more).rstrip("%")) for more in ("", ", 96 blocks")
    )
    assert many / few == pytest.approx(6, rel=0.15)
