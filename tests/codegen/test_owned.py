"""A build changes what nsagen wrote and nothing else, whatever lies in its folder."""

from __future__ import annotations

import errno
import functools
import json
import os
import tempfile
from pathlib import Path

import pytest

from nsagen.cli.app import main
from nsagen.codegen import build as building
from nsagen.codegen.build import build, check
from nsagen.codegen.package import formatted
from nsagen.core.errors import BuildError
from nsagen.core.packages import spec_of
from nsagen.spec import load_spec
from tests.bad.support import contents
from tests.one_op import SPEC, one_op

__all__ = ["one_op"]  # a fixture

PACKAGE = Path("few")
OUT = Path()


@pytest.fixture(autouse=True)
def _rendered_once(one_op: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "package_files", functools.cache(building.package_files))
    (one_op / "other.yaml").write_text(SPEC.replace("DTYPE", "float16"))


def make(spec: str = "few.yaml") -> building.BuildResult:
    return build(load_spec(spec), OUT)


def write(name: str, text: str = "# by hand\n") -> Path:
    path = PACKAGE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "train.py",
        "layers/attention.py",
        "__init__.py",
        "dispatcher.py",
        "kernels/__init__.py",
        "manifest.json",
        "kernels",
        "notes.txt",
        "draft.tmp",
    ],
)
def test_a_folder_of_the_users_is_refused_before_a_byte_is_written(one_op: Path, name: str) -> None:
    write(name)
    before = contents(one_op)
    with pytest.raises(BuildError, match=rf"got {name.partition('/')[0]}, which it did not write"):
        make()
    assert contents(one_op) == before


@pytest.mark.parametrize("name", ["__init__.py", "manifest.json", "kernels/__init__.py"])
def test_a_file_of_the_users_in_place_of_a_new_one_is_refused(one_op: Path, name: str) -> None:
    """In a package whose manifest does not list it, as after a build that was killed."""
    make()
    (PACKAGE / "manifest.json").unlink()
    write(name, json.dumps({"mine": True}))
    if name == "manifest.json":
        for path in PACKAGE.rglob("*.py"):
            path.unlink()
    before = contents(one_op)
    with pytest.raises(BuildError, match=f"got {name}, which it did not write"):
        make()
    assert contents(one_op) == before


@pytest.mark.parametrize("name", ["__init__.py", "kernels"])
def test_a_link_is_refused(one_op: Path, name: str) -> None:
    """Writing through it, or over it, would change what somebody else made."""
    make()
    path = PACKAGE / name
    elsewhere = one_op / f"elsewhere-{name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = contents(one_op)
    with pytest.raises(BuildError, match=f"got .*{name}"):
        make("other.yaml")
    assert contents(one_op) == before


def test_files_beside_a_package_stay(one_op: Path) -> None:
    make()
    mine = [write(name) for name in ("kernels/mine.py", "README.md", "data.tmp", "sub/x.py")]
    hidden = [write(name) for name in (".DS_Store", ".#__init__.py", ".copies/dispatcher.py")]
    (PACKAGE / "kernels" / ".#lock.py").symlink_to("me@host.1234:1")
    result = make("other.yaml")
    assert {path.read_text() for path in (*mine, *hidden)} == {"# by hand\n"}
    assert result.removed
    (note,) = result.notes
    assert note.endswith(
        "left kernels/mine.py, sub/x.py alone, which nsagen did not write or was edited"
    )
    assert check(load_spec("other.yaml"), OUT) == []


def a_kernel() -> Path:
    return next(PACKAGE.glob("kernels/[!_]*.py"))


def test_a_generated_kernel_that_was_copied_and_edited_stays(one_op: Path) -> None:
    """Its first line still says that nsagen generated it."""
    make()
    kernel = a_kernel()
    copies = [PACKAGE / "kernels" / "mine.py", PACKAGE / "fast" / kernel.name, PACKAGE / "x.py"]
    for copy in copies:
        write(copy.relative_to(PACKAGE).as_posix(), kernel.read_text() + "# faster\n")
    for spec in ("few.yaml", "other.yaml"):
        assert not {PACKAGE / path for path in make(spec).removed} & set(copies)
        assert check(load_spec(spec), OUT) == []
    assert all(copy.read_text().endswith("# faster\n") for copy in copies)


@pytest.mark.parametrize("name", ["dispatcher.py", "__init__.py", "kernel"])
def test_an_edited_file_that_no_manifest_lists_is_refused(one_op: Path, name: str) -> None:
    make()
    (PACKAGE / "manifest.json").unlink()
    path = a_kernel() if name == "kernel" else PACKAGE / name
    path.write_text(path.read_text() + "\nEDITED = True\n")
    before = contents(one_op)
    with pytest.raises(BuildError, match=f"got .*{path.name}, which it did not write"):
        make()
    assert contents(one_op) == before


def test_an_edited_file_that_a_build_replaces_is_named(
    one_op: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make()
    text = a_kernel().read_text()
    a_kernel().write_text(text + "\nEDITED = True\n")
    make()
    assert a_kernel().read_text() == text
    assert caplog.messages == [f"build: {a_kernel()} was edited; it is written again"]


def test_an_edited_file_that_no_longer_belongs_to_the_package_stays(one_op: Path) -> None:
    make()
    kernel = a_kernel()
    kernel.write_text(kernel.read_text() + "\nEDITED = True\n")
    result = make("other.yaml")
    assert kernel.read_text().endswith("EDITED = True\n")
    assert f"kernels/{kernel.name}" not in result.removed
    assert result.notes == (
        f"few: left kernels/{kernel.name} alone, which nsagen did not write or was edited",
    )
    assert check(load_spec("other.yaml"), OUT) == []


def test_a_package_without_its_manifest_is_completed(one_op: Path) -> None:
    make()
    whole = contents(PACKAGE)
    (PACKAGE / "manifest.json").unlink()
    a_kernel().write_text(a_kernel().read_text().replace("# Spec: ", "# Spec:  "))
    make()
    assert contents(PACKAGE) == whole


def test_each_removed_file_is_named(one_op: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    old = a_kernel()
    with pytest.raises(SystemExit, match="0"):
        main(["build", "other.yaml", "--out", "."])
    assert f"removed: {old}\n" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["circle", "circle/below", "dangling", "file"])
def test_a_folder_that_cannot_be_one(one_op: Path, out: str) -> None:
    Path("circle").symlink_to("circle")
    Path("dangling").symlink_to("nowhere")
    Path("file").touch()
    with pytest.raises(BuildError, match=rf"build: must be able to write {out}/few; got "):
        build(load_spec("few.yaml"), Path(out))
    assert not Path("nowhere").exists()


def test_a_link_to_the_packages_folder_is_followed(one_op: Path) -> None:
    (one_op / "disk").mkdir()
    PACKAGE.symlink_to(one_op / "disk")
    make()
    assert (one_op / "disk" / "manifest.json").is_file()
    assert make().written == ()


def test_what_a_killed_build_left_is_removed(one_op: Path) -> None:
    make()
    left = write("kernels/.nsagen-abc.tmp")
    assert make().removed == ("kernels/.nsagen-abc.tmp",)
    assert not left.exists()


def test_the_lock_of_another_user_or_name_is_not_emptied(one_op: Path) -> None:
    lock = one_op / ".few.lock"
    lock.write_text("mine")
    os.chmod(lock, 0o444)
    make()
    assert lock.read_text() == "mine"


def test_resources_keep_the_version_of_triton_that_they_are_of(
    one_op: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Triton that compiles some of the variants leaves what another one said of the others."""

    def compiled(count: int, version: str) -> list[str | None]:
        def rows(_: Path, made: tuple) -> dict[str, list[dict[str, object]]]:
            return {
                v.name: [{"kernel": v.name, "target": v.targets[0], "registers": 8}]
                for v in made[:count]
            }

        monkeypatch.setattr(building, "compiler_name", lambda: version)
        build(load_spec("few.yaml"), OUT, compile_all=rows)
        make()
        variants = json.loads((PACKAGE / "manifest.json").read_text())["variants"]
        return [entry.get("triton") for entry in variants.values()]

    assert compiled(0, "3.5.9") == [None] * 4
    assert compiled(4, "3.5.9") == ["3.5.9"] * 4
    assert compiled(1, "3.6.0") == ["3.6.0", "3.5.9", "3.5.9", "3.5.9"]
    assert check(load_spec("few.yaml"), OUT) == []


def test_resources_without_a_version_are_said_to_be_of_an_unknown_one(one_op: Path) -> None:
    """Builds of old wrote none."""
    make()
    path = PACKAGE / "manifest.json"
    content = json.loads(path.read_text())
    name, entry = next(iter(content["variants"].items()))
    entry["resources"] = [{"kernel": name, "target": entry["targets"][0], "registers": 8}]
    path.write_text(json.dumps(content))
    make()
    variants = json.loads(path.read_text())["variants"]
    assert variants[name]["triton"] == "unknown"
    assert sum("triton" in entry for entry in variants.values()) == 1


def test_a_working_folder_that_was_removed(
    one_op: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, gone = load_spec(one_op / "few.yaml"), tmp_path_factory.mktemp("gone")
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert build(spec, one_op).written
    monkeypatch.chdir(one_op)


@pytest.mark.parametrize("text", ["mine", "[1]", None])
def test_a_users_file_with_the_name_of_the_notes(one_op: Path, text: str | None) -> None:
    PACKAGE.mkdir()
    if text is None:
        (PACKAGE / ".nsagen-build.json").symlink_to(one_op / "elsewhere")
    else:
        write(".nsagen-build.json", text)
    before = contents(one_op)
    with pytest.raises(BuildError, match=r"got \.nsagen-build\.json, which it did not write"):
        make()
    assert contents(one_op) == before
    assert not (one_op / "elsewhere").exists()


def test_the_temporary_folder_may_be_ignored_by_a_project(
    one_op: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ruff passes over what .gitignore names and over folders called build."""
    (one_op / ".git").mkdir()
    (one_op / ".gitignore").write_text("*\n")
    (one_op / "build").mkdir()
    files = {"a.py": "x = (1)\n", "b/a.py": "x = 'a'\n"}
    monkeypatch.setattr(tempfile, "tempdir", str(one_op / "build"))
    monkeypatch.setenv("RUFF_OUTPUT_FORMAT", "nonsense")
    assert formatted(files) == {"a.py": "x = 1\n", "b/a.py": 'x = "a"\n'}


def test_a_temporary_folder_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a write names no file, and TMPDIR is not where the user looks."""

    def full(path: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BuildError, match=r"temporary folder, /.*; got No space left .* TMPDIR"):
        formatted({"a.py": "x = 1\n"})


def test_a_specs_name_that_looks_like_an_option(one_op: Path) -> None:
    (one_op / "-few.yaml").write_bytes((one_op / "few.yaml").read_bytes())
    make("./-few.yaml")
    command = json.loads((PACKAGE / "manifest.json").read_text())["command"]
    assert command == "nsagen build ./-few.yaml"
    assert main_exits(command.split()[1:]) == 0
    assert spec_of(PACKAGE) == one_op / "-few.yaml"


def main_exits(words: list[str]) -> object:
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", "."])
    return end.value.code


def test_a_later_versions_list_of_files_is_said_not_to_be_read(
    one_op: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its files are not called edited."""
    make()
    path = OUT / "few" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest |= {"nsagen": "9.0.0", "more": [1]}
    manifest["files"] = {name: {"sha256": was} for name, was in manifest["files"].items()}
    path.write_text(json.dumps(manifest))
    a_kernel().write_text(a_kernel().read_text() + "# as a later version writes it\n")
    stale = check(load_spec("few.yaml"), OUT)
    assert {one.state for one in stale} == {"outdated"}
    count = len(manifest["files"])
    assert caplog.messages == [
        f"{path}: nsagen 9.0.0 wrote more, which is not understood here; a build leaves it out",
        f"{path}: nsagen 9.0.0 lists {count} files in a way that cannot be read here; "
        "a build keeps those that it does not write",
    ]
    make()
    assert check(load_spec("few.yaml"), OUT) == []


def test_kernels_that_a_merge_left_are_orphans(one_op: Path) -> None:
    """No manifest lists them; their headers say that they are nsagen's and the package's."""
    make()
    kernels = {path.name: path.read_text() for path in PACKAGE.glob("kernels/[!_]*.py")}
    make("other.yaml")
    edited, *left = sorted(kernels.keys() - {path.name for path in PACKAGE.glob("kernels/*.py")})
    for name in left:
        write(f"kernels/{name}", kernels[name])
    mine = [
        write(f"kernels/{edited}", kernels[edited] + "\nEDITED = True\n"),
        write(f"kernels/of_{left[0]}", kernels[left[0]]),
        write(left[0], kernels[left[0]]),
    ]
    other = write("kernels/another__01234567.py", kernels[left[0]].replace("       few", " many"))
    orphans = [f"kernels/{name}" for name in left]
    stale = check(load_spec("other.yaml"), OUT)
    assert [(one.path, one.state) for one in stale] == [(path, "orphaned") for path in orphans]
    assert list(make("other.yaml").removed) == orphans
    assert check(load_spec("other.yaml"), OUT) == []
    assert all(path.is_file() for path in (*mine, other))
