"""Each broken file of tuning records stops a build with its one line; nothing is written."""

from pathlib import Path

import pytest

from tests.bad.support import FOLDER, contents, matches, no_hang, run, table
from tests.one_op import one_op

__all__ = ["one_op"]  # a fixture


@pytest.mark.parametrize(
    ("file", "code", "told"), table("records"), ids=lambda value: str(value)[:50]
)
def test_broken_tuning_records(
    file: str, code: int, told: str, one_op: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = one_op / "tuned" / "few" / "gpu.yaml"
    path.parent.mkdir(parents=True)
    path.write_bytes((FOLDER / file).read_bytes())
    before = contents(one_op)
    with no_hang():
        assert run("build", "few.yaml") == code
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.isprintable()
    assert matches(f"tuned/few/gpu.yaml{told}", line), line
    assert contents(one_op) == before
