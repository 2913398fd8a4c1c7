import sys
from pathlib import Path

import pytest

import nsagen
from nsagen.core.errors import InvalidInputError
from nsagen.runtime import package as packages

from .conftest import at_once, package, selected


@pytest.fixture(autouse=True)
def _clean_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in [m for m in sys.modules if m.split(".")[0] in ("generated", "_nsagen_generated_a")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_package_is_found_in_the_working_folder(tmp_path: Path) -> None:
    package(tmp_path, "here", ("kernel",))
    dispatcher = nsagen.load("here")
    assert dispatcher.name == "here"
    assert nsagen.load("here") is dispatcher
    strict = nsagen.load("here", on_missing="error")
    assert strict.on_missing == "error"
    assert nsagen.load("here", on_missing="error") is strict


def test_a_package_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "lib", "on_path", ("kernel",))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    assert nsagen.load("on_path").package == "generated.on_path.kernels"


def test_a_projects_own_package_goes_before_nsagens_and_the_choice_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From a checkout of nsagen, whose own packages are on the path."""
    checkout, project = tmp_path / "checkout", tmp_path / "project"
    for folder in (checkout, project):
        package(folder, "tiny", ("kernel",))
    monkeypatch.syspath_prepend(checkout)
    monkeypatch.setattr(packages, "__file__", str(checkout / "nsagen" / "runtime" / "package.py"))
    monkeypatch.chdir(project)
    with caplog.at_level("INFO", "nsagen.runtime"):
        own = nsagen.load("tiny")
    folder = project / "generated" / "tiny"
    assert own.folder == folder
    assert caplog.messages == [
        f"nsagen.load: {folder} of the working folder, not nsagen's own package"
    ]
    caplog.clear()
    monkeypatch.chdir(checkout)
    with caplog.at_level("INFO", "nsagen.runtime"):
        assert nsagen.load("tiny").folder == checkout / "generated" / "tiny"
    assert not caplog.messages


def test_a_package_is_found_in_the_user_cache(tmp_path: Path) -> None:
    package(tmp_path / "cache", "cached", ("kernel",))
    assert nsagen.load("cached").name == "cached"


def test_its_kernels_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    package(tmp_path, "kerneled", ("one",))
    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
    log: list[str] = []
    nsagen.load("kerneled").launcher(selected(), torch.device("cuda", 0), 1)(log)
    assert log == ["one"]


def test_a_missing_package_says_how_to_build_it() -> None:
    """Its commands are run in tests/cli/test_recommended_commands.py."""
    with pytest.raises(InvalidInputError, match=r"no nowhere\.yaml is in ./specs or shipped"):
        nsagen.load("nowhere")


@pytest.mark.parametrize("name", ["specs/tiny.yaml", "", "../x", "Tiny"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(InvalidInputError, match="not its path"):
        nsagen.load(name)


def test_errors_inside_a_package_are_not_hidden(tmp_path: Path) -> None:
    root = package(tmp_path, "broken", ("kernel",))
    (root / "dispatcher.py").write_text("import module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        nsagen.load("broken")


def test_two_folders_with_packages_of_one_name_keep_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if an entry of `sys.path` stands for the working folder."""
    import torch

    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
    for on_path in (False, True):
        if on_path:
            monkeypatch.syspath_prepend("")
        found = []
        for folder in ("a", "b"):
            if not on_path:
                package(tmp_path / folder, "shared", (f"of_{folder}",))
            monkeypatch.chdir(tmp_path / folder)
            found.append(nsagen.load("shared"))
        for dispatcher, expected in zip(found, ("of_a", "of_b"), strict=True):
            log: list[str] = []
            dispatcher.launcher(selected(), torch.device("cuda", 0), 1)(log)
            assert log == [expected]


def test_threads_that_load_a_package_at_once_get_it_whole(tmp_path: Path) -> None:
    root = package(tmp_path, "slow", ("kernel",))
    text = (root / "dispatcher.py").read_text()
    (root / "dispatcher.py").write_text(f"import time\ntime.sleep(0.1)\n{text}")
    found = at_once(8, lambda: nsagen.load("slow"))
    assert found == [found[0]] * 8
    strict = at_once(8, lambda: nsagen.load("slow", on_missing="error"))
    assert strict == [strict[0]] * 8
