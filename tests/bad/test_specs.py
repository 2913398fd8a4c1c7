"""Each broken spec of this folder ends in its one line, and in nothing else.

To add one: put the file into specs/, and a row with what its author should read into
expected.txt. `Only known keys` and the like stand there in full once, shortened with * elsewhere.
"""

from pathlib import Path

import pytest

from tests.bad.support import FOLDER, contents, matches, no_hang, run, table


@pytest.mark.parametrize(
    ("file", "code", "told"), table("specs"), ids=lambda value: str(value)[:50]
)
def test_a_broken_spec(
    file: str,
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(FOLDER / file)
    with no_hang():
        assert run("build", path, "--out", "made") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    (line,) = err.splitlines()
    assert line.startswith(path)
    assert line.isprintable()
    assert matches(told, line.removeprefix(path)), line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("kind", ["specs", "manifests", "records"])
def test_the_table_has_every_file_once(kind: str) -> None:
    files = [file for file, *_ in table(kind)]
    assert files == sorted(f"{kind}/{path.name}" for path in (FOLDER / kind).iterdir())
    assert kind != "specs" or len(files) >= 60


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("a" * 5000 + ".yaml", "a spec must be a readable file; got File name too long; fix the"),
        ("a" * 5000, "must be a file, or one of "),
        ("x\nimport os.yaml", r"a path must be printable text; got 'x\nimport os.yaml'; rename it"),
        ("\x1b[2J", r"a path must be printable text; got '\x1b[2J'; rename it"),
        ("\udcff.yaml", r"a path must be printable text; got '\udcff.yaml'; rename it"),
        ("\0", r"a path must be printable text; got '\x00'; rename it"),
        ("", "must be a file, or one of "),
        (".", "a spec must be a regular file; got another; name a file"),
    ],
    ids=["long path", "long name", "line break", "escape", "no UTF-8", "nul", "empty", "folder"],
)
def test_a_path_that_no_spec_should_have(
    path: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("build", path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
