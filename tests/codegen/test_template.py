"""A template's hash covers everything that decides what it renders to."""

import shutil
from pathlib import Path

import pytest

from nsagen.codegen import template
from nsagen.core.paths import templates_dir


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The templates and their helpers in folders that a test may edit."""
    shutil.copytree(templates_dir(), tmp_path / "templates")
    shutil.copytree(Path(template.__file__).parent, tmp_path / "codegen")
    monkeypatch.setattr(template, "templates_dir", lambda: tmp_path / "templates")
    monkeypatch.setattr(template, "_CODEGEN", tmp_path / "codegen")
    template.template_hash.cache_clear()
    yield tmp_path
    template.template_hash.cache_clear()


@pytest.mark.parametrize(
    "edited",
    [
        "templates/compressed_attention/forward_warp_specialized.py.j2",
        "templates/shared/walk_to_sequence.py.j2",  # included by what the template includes
        "templates/compressed_attention/space.py",
        "codegen/warp_specialized.py",
        "codegen/attention_tiles.py",
    ],
)
def test_an_edit_anywhere_changes_the_hash(copied: Path, edited: str) -> None:
    name = "compressed_attention/forward_warp_specialized.py.j2"
    before = template.template_hash(name)
    with (copied / edited).open("a") as file:
        file.write("\n# edited\n")
    template.template_hash.cache_clear()
    assert template.template_hash(name) != before


def test_an_edit_elsewhere_does_not(copied: Path) -> None:
    name = "rope/forward_row_tiles.py.j2"
    before = template.template_hash(name)
    (copied / "templates/gated_sum/space.py").write_text("")
    template.template_hash.cache_clear()
    assert template.template_hash(name) == before
