"""A broken manifest is reported as edited and fixed by the next build; it is never believed."""

import functools
from pathlib import Path

import pytest

from nsagen.codegen import build as building
from tests.bad.support import FOLDER, contents, no_hang, run, table
from tests.one_op import one_op

__all__ = ["one_op"]  # a fixture


def test_each_broken_manifest(
    one_op: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = functools.cache(building.package_files)  # formatting takes most of a build
    monkeypatch.setattr(building, "package_files", rendered)
    assert run("build", "few.yaml") == 0
    whole = contents(one_op)
    manifest = one_op / "generated" / "few" / "manifest.json"
    (variant, *_) = sorted((manifest.parent / "kernels").glob("gated_sum*.py"))
    for file, code, told in table("manifests"):
        broken = (FOLDER / file).read_bytes().replace(b"VARIANT", variant.stem.encode())
        manifest.write_bytes(broken)
        capsys.readouterr()
        with no_hang():
            assert run("build", "few.yaml", "--check") == code, file
        out, err = capsys.readouterr()
        stale, _summary = out.splitlines()
        assert (stale, err) == (told, ""), file
        assert manifest.read_bytes() == broken
        assert run("build", "few.yaml") == 0, file
        assert contents(one_op) == whole, file
