"""What a spec may not say, and what its author is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsagen.errors import SpecError
from nsagen.spec import load_spec
from nsagen.spec.document import MAX_BYTES, MAX_PROBLEMS
from tests.spec.test_valid import MINIMAL


def error_of(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    return str(caught.value).replace(str(path), "bad.yaml")


# (line of MINIMAL to replace, what it says instead, what the error says)
SINGLE_VALUES = [
    ("head_dim: 64", "head_dim: 100", "4: attention.head_dim: must be a whole number from 16 to 256"
     " that is a multiple of 8; got 100; the nearest are 96 and 104"),
    ("head_dim: 64", "head_dim: 512", "4: attention.head_dim: *; got 512; the nearest is 256"),
    ("head_dim: 64", "head_dim: [64, 72, 9]", "4: attention.head_dim[2]: *; got 9; *"),
    ("head_dim: 64", "head_dim: [64, 64]", "4: attention.head_dim: each value may be listed once; "
     "got 64 again; remove one"),
    ("head_dim: 64", "head_dim: []", "4: *: must be one value or a list of 1 to 64; "
     "got an empty list; *"),
    ("head_dim: 64", "head_dim:", "4: *: a key needs a value; got none; write one, *"),
    ("head_dim: 64", 'head_dim: "64"', '4: *; got "64"; write it without quotes'),
    ("head_dim: 64", "head_dim: 64.0", "4: *; got 64.0; write it in plain digits, such as 16"),
    ("head_dim: 64", "head_dim: .nan", "4: *; got .nan; *"),
    ("head_dim: 64", "head_dim: true", "4: *; got true; *"),
    ("head_dim: 64", "head_dim: 0100", "4: *; got 0100; *"),  # 64 in YAML 1.1's octal
    ("head_dim: 64", "head_dim: 1:04", "4: *; got 1:04; *"),  # 64 in its base 60
    ("head_dim: 64", "head_dim: {a: 1}", "4: *; got a mapping; *"),
    ("head_dim: 64", "head_dim: " + "9" * 5000, "4: *; got 9999*...; *"),
    ("gqa_ratio: 4", "gqa_ratio: 0", "5: *: must be a whole number from 1 to 64; got 0; *is 1"),
    ("dtype: float16", "dtype: bf16", "6: *: must be one of float16, bfloat16, float32; got bf16; "
     "did you mean 'bfloat16'?"),
    ("dtype: float16", "dtype: float61", "6: *; did you mean 'float16'?"),
    ("compress_type: avgpool", "compress_type: avg_pool", "7: *; did you mean 'avgpool'?"),
    ("window_size: 512", "windowsize: 512", "12: attention.windowsize: only known keys are allowed;"
     " got 'windowsize'; did you mean 'window_size'?"),
    ("window_size: 512", "with_pe: yes", "12: attention.with_pe: must be true or false; got yes; "
     "write true"),
    ("window_size: 512", "topk: 9", "12: attention.topk: a key may occur once; it is also on line "
     "11; keep one"),
    ("window_size: 512", "? [a]\n  : 1", "12: attention: a key must be a word; *"),
    ("name: mine", "name: class", "2: name: must not be a Python keyword*; got 'class'; "
     "choose another, such as 'class_kernels'"),
    ("name: mine", "name: My-Spec", "2: name: must be text of at most 64 characters that begins "
     "with a letter a-z and goes on with a-z, 0-9 and _; got My-Spec; write 'my_spec'"),
    ("name: mine", "name: ../up", "2: name: *; got ../up; write 'up'"),
    ("name: mine", "name: 3", "2: name: *"),
    ("name: mine", "name: " + "a" * 65, "2: name: *"),
    ("name: mine", 'name: ""', "2: name: *"),
]  # fmt: skip

TOP_LEVEL = [
    ("targets: sm_90", "13: targets: must be one of cuda:80, *; got 'sm_90'; "
     "did you mean 'cuda:90'?"),
    ("targets: [cuda:80, cuda:91]", "13: targets[1]: *; did you mean 'cuda:90'?"),
    ("targets: []", "13: targets: *"),
    ("passes: backwards", "13: passes: must be a pass that some op has: *; got 'backwards'; *"),
    ("exclude: [{topk: 9}]", "13: exclude[0]: must match a combination; *"),
    ("exclude: [{topk: 8}]", "13: exclude: must leave at least one combination; *"),
    ("exclude: [{}]", "13: exclude[0]: must name at least one parameter; *"),
    ("exclude: [{topq: 8}]", "13: exclude[0].topq: *; did you mean 'topk'?"),
    ("exclude: {topk: 8}", "13: exclude: must be a list of at most 64 mappings; got a mapping; *"),
    ("exclude: [8]", "13: exclude[0]: must be a mapping with the keys head_dim, *; got 8; *"),
    ("description: [a]", "13: description: *; got a list of 1; *"),
    ("extra: 1", "13: extra: only known keys are allowed; got 'extra'; choose from name, *"),
]  # fmt: skip

COMBINATIONS = [
    ("kernel_stride: 16", "kernel_stride: 24", "9: attention.kernel_stride: kernel_size must be "
     "divisible by kernel_stride; got kernel_size: 32, kernel_stride: 24; choose kernel_stride "
     "from 1, 2, 4, 8, 16, 32"),
    ("kernel_stride: 16", "kernel_stride: 64", "9: *; swap them (kernel_size: 64, kernel_stride: "
     "32): the guide's `kernel_stride must be divisible by kernel_size` is the other way round"),
    ("block_size: 64", "block_size: 24", "10: attention.block_size: block_size must be divisible "
     "by kernel_stride; got block_size: 24, kernel_stride: 16; choose a multiple of 16 *"),
    ("topk: 8", "topk: 2", "11: attention.topk: topk must be at least init_blocks + local_blocks, "
     "*; got topk: 2, init_blocks: 1, local_blocks: 2; choose topk >= 3"),
    ("topk: 8", "topk: [2, 8]", "11: *, or leave it out with "
     "`exclude: [{topk: 2, init_blocks: 1, local_blocks: 2}]`"),
]  # fmt: skip

FORMS = [
    ("", "1: must be a mapping with name and attention; got an empty file; *"),
    ("# only a comment\n", "1: *; got an empty file; *"),
    ("- a\n", "1: must be a mapping with the keys name, *; got a list of 1; *"),
    ("just text\n", "1: must be a mapping *; got just text; *"),
    ("name: [a\n", "2: must be valid YAML; *"),
    ("name: a: b\n", "1: must be valid YAML; *"),
    ("a: 1\nb: \x01\n", "2: must be valid YAML; special characters are not allowed; remove it"),
    ("a: 1\n---\nb: 1\n", "2: one document a file; *"),
    ("a: &x [1]\nb: [*x, *x]\n", "1: anchors and aliases are not allowed; got 'x'; *"),
    ("a: !!python/object/apply:os.system [ls]\n", "1: tags are not allowed; *"),
    ("a: " + "[" * 3000, "1: at most 8 levels of nesting; *"),
    (b"a: 1\nb: \xff\xfe\n", "2: a spec must be UTF-8 text; got byte 0xff at offset 8; *"),
    (b"# " + b"x" * MAX_BYTES, " a spec must be at most 65536 bytes; *"),
]  # fmt: skip


def matches(pattern: str, error: str) -> bool:
    """Whether a line of the error is the pattern, in which * stands for anything."""
    regex = ".*".join(re.escape(part) for part in f"bad.yaml:{pattern}".split("*"))
    return any(re.fullmatch(regex, line) for line in error.splitlines())


@pytest.mark.parametrize(("line", "instead", "told"), SINGLE_VALUES + COMBINATIONS)
def test_a_wrong_value(tmp_path: Path, line: str, instead: str, told: str) -> None:
    assert line in MINIMAL
    error = error_of(tmp_path, MINIMAL.replace(line, instead))
    assert matches(told, error), error


@pytest.mark.parametrize(("line", "told"), TOP_LEVEL)
def test_a_wrong_section(tmp_path: Path, line: str, told: str) -> None:
    error = error_of(tmp_path, MINIMAL + line + "\n")
    assert matches(told, error), error


@pytest.mark.parametrize(("text", "told"), FORMS, ids=range(len(FORMS)))
def test_a_wrong_form(tmp_path: Path, text: str | bytes, told: str) -> None:
    error = error_of(tmp_path, text)
    assert matches(told, error), error


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


def test_lists_that_multiply_to_too_much(tmp_path: Path) -> None:
    many = "[" + ", ".join(map(str, range(1, 65))) + "]"
    text = MINIMAL.replace("window_size: 512", f"window_size: {many}")
    text = text.replace("ratio: 4", f"ratio: {many}").replace("topk: 8", "topk: [8, 16]")
    assert "at most 4096 combinations; got 8192" in error_of(tmp_path, text)


def test_no_more_problems_than_a_person_reads(tmp_path: Path) -> None:
    lines = error_of(tmp_path, "".join(f"key{i}: 1\n" for i in range(500))).splitlines()
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == "bad.yaml: and 482 more problems; mend these first"


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


@given(st.text(alphabet=st.sampled_from("name: atenio[]{}&*!#-\n'\"0\t,|>%?@x"), max_size=80))
def test_any_text_is_a_spec_or_a_spec_error(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError):
        load_spec(path)
