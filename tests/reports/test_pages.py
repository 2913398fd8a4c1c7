"""Pages with pictures: self-contained, and drawn from what the ops and tables really say."""

from __future__ import annotations

import errno
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from nsagen.cli.app import main
from nsagen.core.workload import Workload
from nsagen.ops.reference.block_selection import BlockRule, block_scores
from nsagen.reports import dispatch, patterns
from nsagen.reports.page import page
from nsagen.runtime import Bucket, Dispatcher
from nsagen.spec import load_spec
from tests.one_op import one_op

__all__ = ["one_op"]  # a fixture

SHAPE = load_spec("tiny").shapes[0]


class Outline(HTMLParser):
    """Collects tags, and fails on one that is closed without having been opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag


def check_self_contained(text: str) -> None:
    outline = Outline(text)
    assert not outline.open
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & attributes.keys()
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


@pytest.fixture(scope="module")
def example() -> patterns.Example:
    return patterns.example_of(SHAPE)


class TestPatterns:
    def test_the_selection_follows_the_rules(self, example: patterns.Example) -> None:
        for query, row in zip(example.queries, example.blocks.tolist(), strict=True):
            own, chosen = query // SHAPE.block_size, [b for b in row if b >= 0]
            assert len(chosen) == min(SHAPE.topk, own + 1)
            assert chosen == sorted(set(chosen))
            always = set(range(SHAPE.init_blocks)) | {own - i for i in range(SHAPE.local_blocks)}
            assert {b for b in always if 0 <= b <= own} <= set(chosen)

    def test_a_rows_probabilities_add_up_to_1(self, example: patterns.Example) -> None:
        seen = torch.tensor(example.queries) >= SHAPE.kernel_size - 1
        total = example.probabilities.sum(1)
        assert torch.allclose(total, seen.to(total.dtype), atol=1e-5)

    def test_the_best_scored_block_is_selected(self, example: patterns.Example) -> None:
        parameters = (SHAPE.kernel_size, SHAPE.kernel_stride, SHAPE.block_size, SHAPE.topk)
        rule = BlockRule(*parameters, SHAPE.init_blocks, SHAPE.local_blocks)
        blocks = example.tokens // SHAPE.block_size
        scores = block_scores(example.probabilities[-1], blocks, rule)
        assert int(scores.argmax()) in example.blocks[-1].tolist()

    def test_the_picture_has_three_panels_and_their_colours(
        self, example: patterns.Example
    ) -> None:
        text = patterns.section(example)
        assert text.count("<svg") == text.count("aria-label=") == 3
        for kind in ("compressed", "selected", "forced", "sliding", "causal"):
            assert f'class="{kind}"' in text
        check_self_contained(page("x", "", text))

    def test_a_branch_that_is_off_has_no_panel_and_no_colour(
        self, example: patterns.Example
    ) -> None:
        text = patterns.section(example, ("compressed", "selected"))
        assert text.count("<svg") == 2
        assert "sliding" not in text
        windows = example.probabilities.shape[1]
        alone = patterns.section(example, ("compressed",))
        assert f"reads {windows:,} keys" in alone
        assert 'class="selected"' not in alone

    def test_nothing_is_drawn_after_the_query(self, example: patterns.Example) -> None:
        drawn = patterns._selected(example) + patterns._sliding(example)
        boxes = re.findall(r"M([\d.]+) (\d+)H([\d.]+)v1", drawn)
        assert len(boxes) > patterns.ROWS
        assert all(float(end) <= int(row) + 1 + 1e-6 for _, row, end in boxes)


def test_a_workloads_variants_share_a_row_by_size() -> None:
    workload = Workload.of("rope", "forward", dtype="float16", head_dim=64)
    small, large = (f"rope_forward__f16_d64__{digit * 8}" for digit in "12")
    table = {
        workload: {
            "cuda:90": ((Bucket((None, 1024)), small), (Bucket((1025, None)), large)),
            "cuda:80": ((Bucket(), small),),
        }
    }
    variant = {"algorithm": "row_tiles", "schedule": {"rows": 4}, "provenance": "<default>"}
    use = {"target": "cuda:90", "sizes": "tokens >= 1025", "provenance": "<tuned>"}
    manifest = {"variants": {small: variant, large: variant | {"uses": [use]}}}
    text = dispatch.section(Dispatcher("drawn", "", table), manifest, "cuda:90")
    assert text.count('class="row"') == 1
    assert "tokens &lt;= 1024" in text
    assert "tokens &gt;= 1025" in text
    assert text.count("&lt;default&gt;") == text.count("&lt;tuned&gt;") == 1
    widths = [float(w) for w in re.findall(r"flex-grow:([\d.]+)", text)]
    assert widths == [10, 10]  # powers of two, 1 to 2**10 and on to 2**20
    check_self_contained(page("x", "", text))


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_inspect_writes_a_page(one_op: Path, target: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["inspect", "few.yaml", "--html", "few.html", "--target", target])
    assert not end.value.code
    text = Path("few.html").read_text()
    check_self_contained(text)
    assert f"on {target}</h2>" in text
    assert "block=256" in text if target == "cuda:90" else "block=128" in text
    assert not Path("generated").exists()


def test_inspect_replaces_its_own_page_and_no_file_of_the_users(
    one_op: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def code() -> object:
        with pytest.raises(SystemExit) as end:
            main(["inspect", "few.yaml", "--html", "few.html"])
        return end.value.code

    assert not code()
    assert not code()
    mine = "<!doctype html>\n<title>thesis</title>\n"
    Path("few.html").write_text(mine)
    assert code() == 2
    assert "few.html: must be a new file or a page that nsagen wrote" in capsys.readouterr().err
    assert Path("few.html").read_text() == mine


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(
    one_op: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def code() -> object:
        with pytest.raises(SystemExit) as end:
            main(["inspect", "few.yaml", "--html", "few.html"])
        return end.value.code

    assert not code()
    old = Path("few.html").read_text()
    Path("few.html").write_text(f"{old}<!-- of another version -->")
    monkeypatch.setattr(os, "replace", full)
    assert code() == 1
    assert Path("few.html").read_text().startswith(old)
    assert not list(Path().glob(".nsagen-*"))


def test_inspect_names_the_targets_that_a_spec_has(
    one_op: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["inspect", "few.yaml", "--html", "few.html", "--target", "cuda:100"])
    assert end.value.code == 2
    assert "must be one of the spec's, cuda:80, cuda:90; got 'cuda:100'" in capsys.readouterr().err
