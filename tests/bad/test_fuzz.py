"""Whatever a file holds, loading it ends soon, in a spec or in a SpecError, and writes nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from nsagen.core.errors import SpecError
from nsagen.core.paths import specs_dir
from nsagen.spec import load_spec
from nsagen.spec.document import MAX_BYTES
from nsagen.spec.shape import PARAMETERS
from tests.bad.support import FOLDER, no_hang

GOOD = (specs_dir() / "tiny.yaml").read_bytes()
CORPUS = sorted(path.read_bytes() for path in (FOLDER / "specs").iterdir())

words = st.sampled_from([*PARAMETERS, "name", "passes", "targets", "exclude", "attention", "<<"])
scalars = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(0, 300),
    st.floats(),
    st.booleans(),
    st.none(),
    st.dates(),
    st.sampled_from(["float16", "avgpool", "forward", "cuda:90", "tiny"]),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(words | st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=30,
)


def load(data: bytes) -> None:
    """A spec with a name that can be a package's, or a SpecError of lines that can be shown."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_bytes(data)
        lines = [""]
        try:
            with no_hang():
                spec = load_spec(path)
        except SpecError as error:
            lines = str(error).splitlines()
        else:
            assert spec.name.isidentifier()
            assert spec.name.isascii()
            assert spec.workloads()
        assert all(line.isprintable() for line in lines)
        assert [found.name for found in Path(folder).iterdir()] == ["any.yaml"]


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    load(data)


@given(st.text(alphabet="name: tio[]{}&*!#-\n'\"0\t,|>%?@x\\<=~.\r\u2028\ufeff", max_size=80))
def test_any_text_of_what_yaml_gives_a_meaning(text: str) -> None:
    load(text.encode())


@given(values)
def test_any_document(value: object) -> None:
    load(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(st.dictionaries(words, values, max_size=8), st.dictionaries(words, values, max_size=14))
def test_any_values_under_the_right_keys(top: dict[str, object], attention: object) -> None:
    text = yaml.safe_dump({"name": "drawn", **top, "attention": attention}, allow_unicode=True)
    load(text.encode("utf-8", "surrogatepass"))


@given(st.data())
def test_a_good_or_broken_spec_with_bytes_changed(data: st.DataObject) -> None:
    spec = bytearray(data.draw(st.sampled_from([GOOD, *CORPUS])))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(spec)))
        end = min(len(spec), start + data.draw(st.integers(0, 8)))
        spec[start:end] = data.draw(st.binary(max_size=8))
    load(bytes(spec))


def test_the_largest_files_of_what_is_slow_to_read() -> None:
    """Long runs of what makes parsers look ahead or back."""
    for unit in (
        "a: 1\n",
        "- ",
        "? ",
        "[]\n",
        '"',
        "'",
        "#\n",
        "\n",
        "{",
        "a,",
        "a: [",
        "|\n ",
        "x",
    ):
        load((unit * MAX_BYTES)[:MAX_BYTES].encode())
    load(("name: mine\nattention: {topk: [" + "1," * 30000 + "1]}").encode())
    load(("name: mine\nattention:\n" + "".join(f"  k{i}: 1\n" for i in range(5000))).encode())
