"""What a spec may not say, beyond the files of tests/bad/: several problems, sizes, paths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nsagen.core.errors import SpecError
from nsagen.spec import load_spec
from nsagen.spec.document import MAX_BYTES, MAX_PROBLEMS
from tests.spec.test_valid import MINIMAL


def error_of(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    return str(caught.value).replace(str(path), "bad.yaml")


def test_all_problems_come_at_once_in_the_files_order(tmp_path: Path) -> None:
    text = MINIMAL.replace("64", "65").replace("  topk: 8\n", "").replace("mine", "Mine")
    lines = error_of(tmp_path, text + "targets: cuda:1\n").splitlines()
    starts = [re.match(r"bad\.yaml:(\d+): ([\w.]+): ", line) for line in lines]
    assert [(m[1], m[2]) for m in starts if m] == [
        ("2", "name"),
        ("3", "attention.topk"),
        ("4", "attention.head_dim"),
        ("12", "targets"),
    ]


def test_a_combination_is_named_once_however_many_shapes_have_it(tmp_path: Path) -> None:
    text = MINIMAL.replace("stride: 16", "stride: 24").replace("ratio: 4", "ratio: [1, 2, 4]")
    error = error_of(tmp_path, text.replace("block_size: 64", "block_size: 48"))
    assert len(error.splitlines()) == 1


def test_no_more_problems_than_a_person_reads(tmp_path: Path) -> None:
    lines = error_of(tmp_path, "".join(f"key{i}: 1\n" for i in range(500))).splitlines()
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == "bad.yaml: and 482 more problems; fix these first"


def test_what_is_echoed_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    error = error_of(tmp_path, MINIMAL.replace("mine", r'"\e[2J\ud800"'))
    assert r"\x1b[2J\ud800" in error
    assert "\x1b" not in error


@pytest.mark.parametrize("form", ["missing.yaml", ".", "/dev/zero"])
def test_a_path_that_is_no_file(form: str) -> None:
    with pytest.raises(SpecError, match=r"a spec must be a (readable|regular) file"):
        load_spec(Path(form))


def test_a_name_that_is_no_spec_offers_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'tiny'"):
        load_spec("tinny")


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    told = "a spec must be at most 65536 bytes; got more; split it into several"
    assert told in error_of(tmp_path, b"# " + b"x" * MAX_BYTES)
