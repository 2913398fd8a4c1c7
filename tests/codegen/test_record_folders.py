"""A package is built again with the tuning records of its last build, from wherever that is."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path

import pytest

from nsagen.cli import doctor
from nsagen.codegen.build import build, check
from nsagen.codegen.template import default_schedule, kernel_fingerprint
from nsagen.core.bucket import Bucket
from nsagen.core.errors import BuildError, InvalidInputError
from nsagen.core.target import parse_target
from nsagen.core.workload import Schedule, Workload
from nsagen.records.files import save_records
from nsagen.records.record import TuningRecord
from nsagen.spec import load as loading
from nsagen.spec import load_spec
from tests.cli.test_app import Ran
from tests.one_op import one_op

__all__ = ["one_op"]  # a fixture

FILE = "static-cuda-80.yaml"


def record_of(workload: Workload) -> TuningRecord:
    default = default_schedule(workload, parse_target("cuda:80"))
    schedule = Schedule.of(default.algorithm, {"block": 64})
    return TuningRecord(
        workload=workload,
        bucket=Bucket(),
        objective="static",
        sizes="1 x 2048 tokens",
        schedule=schedule,
        fingerprint=kernel_fingerprint(workload, schedule),
        ms=1.0,
        spread=0.0,
        default=None,
        runner_up=None,
        measured=1,
        failed=0,
        of=3,
        ended="its time is up",
        triton="3.6.0",
        driver="none",
        nsagen="0.0.9",
        date="2026-01-01T00:00:00Z",
    )


def tune(folder: Path, spec: str = "few") -> Path:
    """What a run of `nsagen tune` writes into a folder."""
    workload = load_spec(spec).workloads()[0]
    return save_records(folder, "static-cuda-80", "cuda:80", [record_of(workload)])


def used(package: Path) -> list[str]:
    """The files of records that a package was built with."""
    return list(json.loads((package / "manifest.json").read_text())["tuned"])


@pytest.fixture
def project(one_op: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's project; `few` is a spec of an installed nsagen. The working folder is outside."""
    wheel = one_op / "site-packages" / "nsagen" / "_specs"
    wheel.mkdir(parents=True)
    (one_op / "few.yaml").rename(wheel / "few.yaml")
    for module in ("nsagen.spec.load", "nsagen.core.packages"):
        monkeypatch.setattr(f"{module}.specs_dir", lambda: wheel)
    folder = one_op / "my project"
    (folder / "deep").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    monkeypatch.chdir(folder)
    tune(folder / "specs" / "tuned" / "few")
    (one_op / "outside").mkdir()
    return folder


def told_by_doctor(project: Path) -> str:
    (problem,) = [
        text
        for text in doctor.examine(project / "generated")["problems"]
        if str(project / "generated") in text
    ]
    return problem


@pytest.mark.parametrize("where", ["outside", "my project/deep", "other"])
@pytest.mark.parametrize("remembered", [True, False])
def test_doctors_remedy_for_a_shipped_spec_keeps_the_users_records(
    project: Path,
    where: str,
    remembered: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the package is of a version that did not note where its records were."""
    assert Ran(capsys, "build", "few").code == 0
    package = project / "generated" / "few"
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["records"] == {"path": "../../specs/tuned/few", "with_shipped": True}
    if not remembered:
        del manifest["records"]
        (package / "manifest.json").write_text(json.dumps(manifest))
    (package / "__init__.py").write_text("# edited\n")
    other = project.parent / "other"  # another project, with other records of the spec
    other.mkdir()
    (other / ".git").mkdir()
    if remembered:
        tune(other / "specs" / "tuned" / "few").rename(other / "specs" / "tuned" / "few" / "x.yaml")
    monkeypatch.chdir(project.parent / where)
    told = told_by_doctor(project)
    command = shlex.split(told[told.index("nsagen build") :])
    assert Ran(capsys, *command[1:]).code == 0
    assert used(package) == [FILE]
    monkeypatch.chdir(project)
    assert Ran(capsys, "build", "few", "--check").code == 0


def test_records_that_are_gone_are_missed_by_name(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Ran(capsys, "build", "few").code == 0
    before = used(project / "generated" / "few")
    records = (project / "specs" / "tuned" / "few").rename(project.parent / "moved")
    told = told_by_doctor(project)
    assert "cannot be checked" in told
    assert str(project / "specs" / "tuned" / "few") in told
    for options in ((), ("--check",)):
        ran = Ran(capsys, "build", "few", *options)
        assert ran.code == 1
        assert "its tuning records must be where its last build found them" in ran.err
    assert used(project / "generated" / "few") == before
    assert Ran(capsys, "build", "few", "--tuned", str(records)).code == 0
    assert used(project / "generated" / "few") == before
    assert Ran(capsys, "build", "few").code == 0
    assert used(project / "generated" / "few") == before


def test_a_file_of_records_that_is_gone_is_named(
    one_op: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A build goes on: its user may have removed the file on purpose."""
    path = tune(one_op / "tuned" / "few", "few.yaml")
    spec = load_spec("few.yaml")
    build(spec, Path())
    assert "records" not in json.loads(Path("few/manifest.json").read_text())
    path.unlink()
    expected = (
        f"build: few was built with the tuning records {FILE}, which are not in tuned/few; they do "
        "not count any more; to keep them, name their folder with --tuned"
    )
    check(spec, Path())
    build(spec, Path())
    assert caplog.messages == [expected, expected]
    build(spec, Path())
    assert len(caplog.messages) == 2


def test_a_given_folder_is_remembered_until_another_is_given(one_op: Path) -> None:
    tune(one_op / "tuned" / "few", "few.yaml")
    own = one_op / "my own"
    tune(own, "few.yaml").rename(own / "mine.yaml")
    spec, package = load_spec("few.yaml"), Path("few")
    build(spec, Path(), tuned=Path("my own"))
    assert used(package) == ["mine.yaml"]
    assert check(spec, Path()) == []
    result = build(spec, Path())
    assert result.written == ()
    assert result.notes[0] == f"few: with the tuning records in {own}, as in its last build"
    build(spec, Path(), tuned=Path("tuned/few"))
    assert used(package) == [FILE]
    assert "records" not in json.loads((package / "manifest.json").read_text())
    assert not any("as in its last build" in note for note in build(spec, Path()).notes)


def test_build_takes_the_folder_that_tune_was_given(one_op: Path) -> None:
    """`tune --out own` writes into own/<spec>."""
    tune(one_op / "own" / "few", "few.yaml")
    spec = load_spec("few.yaml")
    build(spec, Path(), tuned=Path("own"))
    assert used(Path("few")) == [FILE]
    tune(one_op / "own", "few.yaml")
    with pytest.raises(InvalidInputError, match="got own, which has some, and so has own/few"):
        build(spec, Path(), tuned=Path("own"))


def test_a_folder_without_records_is_named(one_op: Path) -> None:
    Path("empty").mkdir()
    notes = build(load_spec("few.yaml"), Path(), tuned=Path("empty")).notes
    assert notes == ("empty has no tuning records, so every kernel has its default schedule",)


@pytest.mark.parametrize("place", [7, [], {"path": 7}, {"path": "a\0b"}, {"path": "x" * 5000}])
def test_a_place_that_nsagen_would_not_write(one_op: Path, place: object) -> None:
    """It ends in an error that names it, or counts for nothing where it is not a place at all."""
    spec = load_spec("few.yaml")
    build(spec, Path())
    path = Path("few/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"records": place}))
    is_place = isinstance(place, dict) and isinstance(place["path"], str)
    refused = pytest.raises(BuildError, match="its tuning records must be")
    with refused if is_place else contextlib.nullcontext():
        build(spec, Path())


def test_a_shipped_spec_taken_below_a_folder_with_one_of_its_name_is_told(
    one_op: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing marks the folder as a project, so the spec there is not found from below."""
    other = one_op / "specs" / "tiny.yaml"
    (one_op / "sub").mkdir()
    other.parent.mkdir()
    (one_op / "few.yaml").rename(other)
    monkeypatch.chdir(one_op / "sub")
    monkeypatch.setattr(loading, "project_roots", lambda path: iter(()))
    with caplog.at_level("INFO", "nsagen.spec"):
        assert load_spec("tiny").label == "tiny"
    (message,) = caplog.messages
    assert message.startswith(f"spec tiny: the shipped one, not {other}, as {one_op} is no project")
