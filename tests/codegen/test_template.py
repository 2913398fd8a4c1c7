"""A kernel is what its code is: names, records and what was compiled follow from that alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsagen.aot.cached import compile_key
from nsagen.codegen import template
from nsagen.codegen.fingerprint import source_fingerprint
from nsagen.codegen.package import Origin, variant_header
from nsagen.codegen.plan import Variant, plan_variants
from nsagen.codegen.spaces import attention_tiles
from nsagen.core.paths import templates_dir
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload, variant_name
from nsagen.spec import load_spec

SM90 = KNOWN_TARGETS["cuda:90"]
ORIGIN = Origin("tiny", "specs/tiny.yaml", "")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The templates in a folder that a test may edit."""
    shutil.copytree(templates_dir(), tmp_path / "templates")
    monkeypatch.setattr(template, "templates_dir", lambda: tmp_path / "templates")
    template.forget()
    yield tmp_path / "templates"
    template.forget()


def planned() -> tuple[Variant, ...]:
    """The default kernels of a shipped spec, by the templates as they are now."""
    template.forget()
    few = ("rope", "selected_attention", "compressed_attention")
    workloads = [w for w in load_spec("tiny").workloads() if w.op in few and w.pass_ == "forward"]
    return plan_variants(workloads, ["cuda:90"])


def texts(variants: tuple[Variant, ...]) -> dict[str, str]:
    """Name -> what a build writes, but for its layout."""
    return {
        v.name: template.render(v.workload, v.schedule, variant_header(v, ORIGIN)) for v in variants
    }


def compile_keys(variants: tuple[Variant, ...], folder: Path) -> dict[str, str]:
    """Name -> the key by which what was compiled of a kernel is found again."""
    found = {}
    for variant, text in zip(variants, texts(variants).values(), strict=True):
        path = folder / f"{variant.name}.py"
        path.write_text(text)
        found[variant.name] = compile_key(path, variant.workload, SM90)
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new))


def test_a_moved_helper_or_a_comment_in_a_space_changes_no_file(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = texts(planned())
    helper, moved = Path(attention_tiles.__file__), tmp_path / "moved_tiles.py"
    moved.write_text(f"# Moved.\n{helper.read_text()}")
    monkeypatch.syspath_prepend(str(tmp_path))
    space = copied / "compressed_attention" / "space.py"
    edit(
        space,
        "from nsagen.codegen.spaces import attention_tiles",
        "import moved_tiles as attention_tiles",
    )
    edit(copied / "rope" / "space.py", "SPACES = ", "# A comment.\nSPACES = ")
    assert texts(planned()) == before
    assert sys.modules.pop("moved_tiles")


CHECK = "selected_attention/check_forward.py.j2"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rope/forward_row_tiles.py.j2", "import triton\n", "# A comment.\nimport triton\n"),
        (CHECK, '"""Raise ValueError', '"""In other words: raise ValueError'),
        (CHECK, "softmax_scale must be positive", "softmax_scale: more than 0"),
    ],
    ids=["comment", "docstring", "error text"],
)
def test_words_rename_nothing_and_recompile_nothing(
    file: str, old: str, new: str, copied: Path, tmp_path: Path
) -> None:
    before = planned()
    written, compiled = texts(before), compile_keys(before, tmp_path)
    edit(copied / file, old, new)
    after = planned()
    assert [v.name for v in after] == [v.name for v in before]
    assert [v.fingerprint for v in after] == [v.fingerprint for v in before]
    assert texts(after) != written  # as a reader sees them
    assert compile_keys(after, tmp_path) == compiled


def test_a_changed_instruction_renames_the_files_of_its_template_alone(
    copied: Path, tmp_path: Path
) -> None:
    before = planned()
    compiled = compile_keys(before, tmp_path)
    edit(copied / "rope" / "forward_row_tiles.py.j2", "tl.program_id(0)", "tl.program_id(0) + 0")
    after = planned()
    gone = {v.name: v.template for v in before if v.name not in texts(after)}
    assert set(gone.values()) == {"rope/forward_row_tiles.py.j2"}
    assert len(gone) == sum(v.workload.op == "rope" for v in before)
    changed = compile_keys(after, tmp_path).items() - compiled.items()
    assert {name.partition("__")[0] for name, _ in changed} == {"rope_forward"}


def test_schedules_of_equal_code_have_names_of_their_own() -> None:
    workload = Workload.of("rope", "forward", dtype="float16", head_dim=64)
    schedules = [Schedule.of("row_tiles", num_stages=stages) for stages in (1, 2)]
    assert len({variant_name(workload, schedule, "0" * 16) for schedule in schedules}) == 2


ONE, OTHER = "def one(x):\n    return x", "def other(x):\n    return one(x)"
TEXT = '"""Text with\n\n\nblank lines."""'


@pytest.mark.parametrize(
    "same",
    [
        f"{ONE}\n\n\n{OTHER}",
        f"{TEXT}\n\n\n{ONE}\n\n\n# A comment.\n\n\n{OTHER}",
        f"{ONE}\n{OTHER}\n".replace("return", "  return"),
        f"{ONE}\n{OTHER}\n    raise ValueError('text')\n",
    ],
)
def test_a_fingerprint_is_of_statements_not_of_their_layout(same: str) -> None:
    known = source_fingerprint(f"{ONE}\n{OTHER}", "one")
    assert source_fingerprint(same, "one") == known
    assert source_fingerprint(same.replace("one", "two"), "two") == known
    assert source_fingerprint(same.replace("return x", "return 2"), "one") != known


@pytest.mark.parametrize("between", ["\n", "\n\n\n"])
def test_a_source_that_is_not_python_is_refused_by_line(between: str) -> None:
    with pytest.raises(SyntaxError) as refused:
        source_fingerprint(f"{ONE}{between}def (x):\n", "one")
    assert refused.value.lineno == 2 + len(between)
