"""Every code block of the documentation runs; what it takes from the code is up to date."""

from __future__ import annotations

import ast
import importlib
import logging
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nsagen.codegen import template
from nsagen.core.target import KNOWN_TARGETS
from nsagen.reports import target_support
from tests.docs.blocks import DOCS, ROOT, Reader, blocks_of, follow

PAGES = sorted(path.name for path in DOCS.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
WALK = ("walk.md", "minimax-m3.md")
"""What a newcomer reads after the README: the pages of an own spec and model, and of M3."""

OF_TRANSFORMERS = {"any-model.md", "evidence.md", "export.md", "minicpm.md"}


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    logger = logging.getLogger("nsagen")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers, logger.level = handlers, level


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, one thread, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def own_templates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of the templates in the working folder, as in a checkout."""
    shutil.copytree(ROOT / "templates", folder / "templates")
    monkeypatch.setattr(template, "templates_dir", lambda: folder / "templates")
    template.forget()
    yield
    template.forget()


@pytest.mark.parametrize("page", sorted({*PAGES} - {"templates.md", "transformers.md", *WALK}))
def test_every_block_runs(page: str, folder: Path) -> None:
    if page in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    if page == "export.md":
        pytest.importorskip("kernels")
    assert follow(page, folder).ran > 0


def test_the_walk_of_a_newcomer(folder: Path) -> None:
    """In one folder: all of the README, its own spec, then the two ways that it leads to."""
    pytest.importorskip("transformers")
    assert follow("../README.md", folder).ran > 0
    (spec,) = (block for block in blocks_of(ROOT / "README.md") if block.language == "yaml")
    (folder / "specs").mkdir(exist_ok=True)
    (folder / "specs" / "mine.yaml").write_text(spec.text, encoding="utf-8")
    Reader(folder, interpreting=False).shell("nsagen inspect mine", "README.md, its spec")
    ways = README.partition("## Three ways in\n")[2].partition("\n## ")[0]
    for page in WALK:
        assert f"(docs/{page})" in ways, f"the README has to lead to {page}"
        assert follow(page, folder).ran > 0


def test_the_readme_begins_with_a_fresh_machine() -> None:
    """Two commands, and CI runs what the second one runs."""
    first = next(block for block in blocks_of(ROOT / "README.md") if block.language == "sh")
    made = re.findall(r"^make (\S+)", first.text, re.M)
    assert made == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tests = re.findall(r"^\t\$\(MAKE\) (test-\S+)$", makefile.partition("\ntest: ")[2], re.M)[:2]
    (checked,) = re.findall(r"^check: .*\n\t(.*)$", makefile, re.M)
    assert {*tests} <= {*checked.split()}
    assert "\nmake check\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_transformers_page(folder: Path) -> None:
    """Its `nsagen generate` reads a tokenizer, which a random checkpoint lacks."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"word{i}": i for i in range(512)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "checkpoint").mkdir()
    made.save(str(folder / "checkpoint" / "tokenizer.json"))
    assert follow("transformers.md", folder).ran > 0


def test_a_template_of_your_own(folder: Path, own_templates: None) -> None:
    assert follow("templates.md", folder).ran > 0


@pytest.mark.interpreter
def test_the_walk_on_real_kernels(folder: Path) -> None:
    """From a spec of one's own to its kernels in one's own model."""
    assert follow("walk.md", folder).ran > 0


@pytest.mark.interpreter
def test_a_template_of_your_own_on_real_kernels(folder: Path, own_templates: None) -> None:
    assert follow("templates.md", folder).ran > 0


def test_what_pages_take_from_the_code_is_up_to_date() -> None:
    generate = runpy.run_path(str(DOCS / "generate.py"))
    for path, text in generate["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run: make generate"


@pytest.mark.parametrize("package", ["nsagen.ops", "nsagen.model", "nsagen.distributed"])
def test_the_reference_has_every_public_name(package: str) -> None:
    module = importlib.import_module(package)
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(rf"^::: ({re.escape(package)}\.\S+)$", pages, re.M))
    public = {
        f"{thing.__module__}.{name}"
        for name in module.__all__
        if callable(thing := getattr(module, name))
    }
    assert public == shown


def test_what_the_readme_links_to_is_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(linked) > 20
    for target in linked:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_measured_figure_of_the_readme_says_where_it_is_from() -> None:
    """By a link, or by the command that measures it. Tables end with theirs."""
    prose = re.sub(r"```.*?```|<!-- generated.*?<!-- end -->", "", README, flags=re.DOTALL)
    measured = [p for p in prose.split("\n\n") if re.search(r"\d (ms|GiB|tokens/s)\b|loss is", p)]
    assert measured
    for paragraph in measured:
        evidence = re.search(
            r"\]\((benchmarks|docs)/|`(python benchmarks/|nsagen bench)", paragraph
        )
        assert evidence, paragraph


def _texts() -> set[str]:
    """Every string of the package's sources, with … for what an f-string puts in."""
    texts: set[str] = set()
    for path in (ROOT / "nsagen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
                texts.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def test_the_readme_says_compiles_where_nothing_ran() -> None:
    """A GPU on which kernels ran has results that are committed; for the others they compile."""
    (ran,) = re.findall(r"compiles for every target; it has run on ([^.]*) GPUs", README)
    results = (ROOT / "benchmarks" / "results").rglob("*.json")
    found = re.findall(r"NVIDIA (\w+)", " ".join(path.read_text("utf-8") for path in results))
    assert set(ran.split(" and ")) == set(found)
    table = target_support.read(DOCS / "support.json")
    assert {target for _, target in table} == set(KNOWN_TARGETS)
    assert not [usage.error for usage in table.values() if usage.error]


def test_troubleshooting_is_by_texts_that_exist() -> None:
    texts = _texts()
    headings = re.findall(r"^### (.+)$", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(headings) > 15
    for heading in headings:
        pieces = [piece.strip() for piece in heading.split("…") if piece.strip()]
        known = any(all(piece in text for piece in pieces) for text in texts)
        assert known, f"no error says: {heading}"


def test_every_logger_is_in_the_documented_tree() -> None:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "nsagen").rglob("*.py"))
    used = {name for text in sources for name in re.findall(r'getLogger\("(nsagen[^"]*)"\)', text)}
    section = (DOCS / "cli.md").read_text().partition("## Logging")[2]
    assert used == set(re.findall(r"^\| `(nsagen[\w.]*)` \|", section, re.M))
    assert not any("getLogger()" in path.read_text() for path in (ROOT / "nsagen").rglob("*.py"))


def test_the_measured_distances_are_those_of_the_page() -> None:
    pytest.importorskip("transformers")
    from tests.integrations.test_transformers import dense_model, distance, sparse_model, tokens

    page = (DOCS / "transformers.md").read_text()
    rows = re.findall(r"^\| (\d+) \|((?: [\d.]+ \|){4})$", page, re.M)
    assert len(rows) == 4
    with torch.no_grad():
        for length, values in rows[:3]:
            ids = tokens(1, int(length))
            expected = dense_model("Llama")(ids).logits
            for topk, value in zip((4, 8, 16, 32), values.split("|"), strict=False):
                measured = distance(sparse_model("Llama", topk=topk)(ids).logits, expected)
                assert measured == pytest.approx(float(value), rel=0.05, abs=0.001)


def test_the_site_builds_with_every_link_in_place(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.with_suffix(".html").name for path in map(Path, PAGES)} <= {
        path.name for path in tmp_path.glob("*.html")
    }
    for path in tmp_path.glob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', path.read_text()
        )
        assert not fetched, f"{path.name} fetches {fetched}"


def test_no_page_is_without_blocks_that_run() -> None:
    for page in PAGES:
        assert any(block.language in ("python", "sh") for block in blocks_of(DOCS / page)), page
