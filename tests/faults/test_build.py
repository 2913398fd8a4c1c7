"""What can happen to a build: the package is the old one, the new one, or refuses to import."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsagen.codegen import build as building
from nsagen.codegen.build import build, check
from nsagen.core.errors import BuildError, InvalidInputError
from nsagen.core.paths import specs_dir
from nsagen.runtime.package import load
from nsagen.spec import load_spec
from tests.bad.support import contents, run
from tests.faults.support import forked, killed_at, small_disk, with_files_of_at_most
from tests.one_op import SPEC, one_op

__all__ = ["one_op"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("generated")


@pytest.fixture
def folder(one_op: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`one_op` with a second spec of the same name; formatting is done once for each."""
    rendered = functools.cache(building.package_files)
    monkeypatch.setattr(building, "package_files", rendered)
    (one_op / "other.yaml").write_text(SPEC.replace("DTYPE", "float16"))
    yield one_op
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if "generated" in name]:
        del sys.modules[name]


def make(spec: str = "few.yaml") -> None:
    build(load_spec(spec), OUT)


def made(spec: str) -> dict[str, bytes]:
    """The files of a build that nothing disturbs."""
    shutil.rmtree(OUT, ignore_errors=True)
    make(spec)
    files = contents(OUT / "few")
    shutil.rmtree(OUT)
    return files


def imported() -> list[str] | None:
    """The files of the kernels that the package's table names; None if it refuses to load."""
    forget()
    try:
        rows = load("few").describe()
    except InvalidInputError as error:
        known = r"run: nsagen build few\.yaml$"
        unknown = r"give nsagen build the path of its spec: no few\.yaml is in"
        assert re.search(f"{known}|{unknown}", str(error))  # noqa: PT017
        return None
    return [f"kernels/{row['variant']}.py" for row in rows]


def test_killed_before_each_file_of_a_first_build(folder: Path) -> None:
    whole = made("few.yaml")
    for step in itertools.count():
        killed = killed_at(step, make)
        # The first file notes what will be written; the last, the manifest, is not imported.
        assert (imported() is None) == (step < len(whole))
        make()
        assert contents(OUT / "few") == whole
        shutil.rmtree(OUT)
        if not killed:
            break
    assert step == len(whole) + 1


def test_another_build_after_one_that_was_killed_leaves_nothing_of_it(folder: Path) -> None:
    other = made("other.yaml")
    for step in itertools.count():
        killed = killed_at(step, make)
        make("other.yaml")
        assert contents(OUT / "few") == other
        shutil.rmtree(OUT)
        if not killed:
            break


def test_killed_before_each_file_of_a_build_over_another(folder: Path) -> None:
    """The kernels of the table are all there, and all of the old package or of the new one."""
    old, new = made("few.yaml"), made("other.yaml")
    seen = set()
    for step in itertools.count():
        make("few.yaml")
        killed = killed_at(step, lambda: make("other.yaml"))
        kernels, files = imported(), contents(OUT / "few")
        assert kernels is not None
        (of,) = {file in new for file in kernels}
        seen.add(of)
        assert all(files[file] == (new if of else old)[file] for file in kernels)
        assert not killed or check(load_spec("other.yaml"), OUT)
        make("other.yaml")
        assert contents(OUT / "few") == new
        shutil.rmtree(OUT)
        if not killed:
            break
    assert seen == {False, True}


def test_builds_of_two_specs_of_one_name_at_once(folder: Path) -> None:
    either = made("few.yaml"), made("other.yaml")
    specs = ("few.yaml", "other.yaml") * 3
    codes = forked([lambda spec=spec: make(spec) for spec in specs])
    assert codes == [0] * len(specs)
    assert contents(OUT / "few") in either


def test_a_clock_that_stands_still_or_jumps_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another package of the same sizes, at the same times: it is what gets imported."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    make("few.yaml")
    before = {path: path.stat() for path in OUT.rglob("*.py")}
    old = imported()
    assert list(OUT.rglob("dispatcher.*.pyc"))
    (folder / "two.yaml").write_text((folder / "other.yaml").read_text())
    make("two.yaml")
    for path in [path for path in before if path.exists()]:
        assert path.stat().st_size == before[path].st_size
        os.utime(path, ns=(before[path].st_atime_ns, before[path].st_mtime_ns))
    new = imported()
    assert old
    assert new
    assert not set(old) & set(new)
    assert all((OUT / "few" / file).is_file() for file in new)


def refused() -> int:
    """1 if a build ends in the error of a file that may not grow."""
    try:
        make()
    except BuildError as error:
        told = r"build: must be able to write generated/few; got File too large: .*; fix that"
        return 1 if re.match(told, str(error)) else 2
    return 0


@pytest.mark.parametrize("size", [0, 100, 1500])
def test_no_room_for_a_file(folder: Path, size: int) -> None:
    whole = made("few.yaml")
    assert with_files_of_at_most(size, refused) == 1
    fits = all(len(text) <= size for path, text in whole.items() if path.endswith(".py"))
    assert (imported() is not None) == fits  # then only the manifest is missing
    assert not list(OUT.rglob("*.tmp"))
    make()
    assert contents(OUT / "few") == whole


def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system with room for a part of the package, then for all of it."""
    whole = made("few.yaml")
    OUT.mkdir()
    try:
        with small_disk(OUT, "16k") as resize:
            assert run("build", "few.yaml") == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("nsagen: build: must be able to write generated/few; got No spa")
            assert imported() is None
            resize("1m")
            make()
            assert contents(OUT / "few") == whole
    finally:
        forget()


@pytest.mark.parametrize("kind", ["no such place", "a file", "read-only"])
def test_a_folder_that_cannot_be_written(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    if kind == "a file":
        out.touch()
    elif kind == "no such place":
        out = Path("/proc/nsagen")
    else:
        out.mkdir(0o500)
    with contextlib.ExitStack() as stack:
        if kind == "read-only" and os.geteuid() == 0:  # who may write into any folder but this
            stack.enter_context(small_disk(out, "1m,ro"))
        assert run("build", "few.yaml", "--out", str(out)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nsagen: build: must be able to write {out}/few; got ")


@pytest.mark.parametrize("damage", ["edited", "cut", "empty", "binary", "gone", "a folder"])
@pytest.mark.parametrize("file", ["__init__.py", "dispatcher.py", "manifest.json", "kernel"])
def test_a_damaged_file_is_named_and_mended(folder: Path, damage: str, file: str) -> None:
    make()
    whole = contents(OUT / "few")
    if file == "kernel":
        file = next(path for path in sorted(whole) if path.startswith("kernels/gated"))
    path = OUT / "few" / file
    if damage in ("gone", "a folder"):
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    else:
        text = whole[file]
        other = {"edited": text + b"# mine\n", "cut": text[: len(text) // 2], "empty": b""}
        path.write_bytes(other.get(damage, b"\xff\0\xfe"))
    (stale,) = check(load_spec("few.yaml"), OUT)
    assert (stale.path, stale.state) == (file, "missing" if not path.is_file() else "edited")
    if damage == "a folder":
        with pytest.raises(BuildError, match=f"Is a directory: .*{Path(file).name}"):
            make()
        path.rmdir()
    make()
    assert contents(OUT / "few") == whole


def test_a_kernel_that_is_gone_says_what_to_run(folder: Path) -> None:
    make()
    forget()
    dispatcher = load("few", on_missing="error")
    for row in dispatcher.describe():
        (OUT / "few" / "kernels" / f"{row['variant']}.py").unlink(missing_ok=True)
    kernel = dispatcher._loader(dispatcher.describe()[0]["variant"])
    with pytest.raises(BuildError, match=r"must be whole; .*run: nsagen build few\.yaml"):
        kernel()


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("gated_sum/forward_elementwise.py.j2", "must be readable; got No such file"),
        ("gated_sum/space.py", "each op needs a schedule space"),
        ("package/init.py.j2", "package/init.py.j2: "),
        ("package/dispatcher.py.j2", "package/dispatcher.py.j2: "),
    ],
)
def test_a_missing_template(
    one_op: Path, gone: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (one_op / "templates" / gone).unlink()
    assert run("build", "few.yaml") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not OUT.exists()


@pytest.mark.slow
def test_the_command_killed_every_50_ms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nsagen build` of the tiny spec from start to end, each time into a new folder."""
    text = (specs_dir() / "tiny.yaml").read_text()
    (tmp_path / "killed.yaml").write_text(text.replace("name: tiny", "name: killed"))
    command: Any = [sys.executable, "-m", "nsagen", "build", tmp_path / "killed.yaml", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, tmp_path / "whole"], check=True, env=environment)
    whole = contents(tmp_path / "whole" / "killed")
    for number in itertools.count(1):
        out = tmp_path / str(number) / "generated"
        out.parent.mkdir()
        monkeypatch.chdir(out.parent)
        process = subprocess.Popen([*command, out], env=environment)
        time.sleep(0.05 * number)
        process.send_signal(signal.SIGKILL)
        ended = process.wait() == 0
        forget()
        if out.is_dir() and contents(out / "killed").keys() >= whole.keys() - {"manifest.json"}:
            assert load("killed").describe()
        else:
            with pytest.raises(InvalidInputError, match=r"; (run: |give )nsagen build "):
                load("killed")
        if number % 10 == 0 or ended:
            subprocess.run([*command, out], check=True, env=environment)
            assert contents(out / "killed") == whole
        if ended:
            break
