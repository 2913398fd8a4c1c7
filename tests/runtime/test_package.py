import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import nsagen
from nsagen.core.errors import InvalidInputError
from nsagen.core.importing import LOCK, complete_before_forks
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


def test_a_projects_own_package_is_found_from_its_subfolders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the command line finds its specs there."""
    checkout, project = tmp_path / "checkout", tmp_path / "project"
    for folder in (checkout, project):
        package(folder, "tiny", ("kernel",))
    package(project, "alone", ("kernel",))
    (project / ".git").mkdir()
    (project / "scripts").mkdir()
    monkeypatch.syspath_prepend(checkout)
    monkeypatch.setattr(packages, "__file__", str(checkout / "nsagen" / "runtime" / "package.py"))
    monkeypatch.chdir(project / "scripts")
    with caplog.at_level("INFO", "nsagen.runtime"):
        assert nsagen.load("tiny").folder == project / "generated" / "tiny"
    assert caplog.messages == [
        f"nsagen.load: {project}/generated/tiny of the working folder's project, not nsagen's own "
        "package"
    ]
    assert nsagen.load("alone").folder == project / "generated" / "alone"


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


@pytest.mark.parametrize("damaged", ["__init__.py", "dispatcher.py"])
def test_conflict_marks_in_a_package_are_named_with_a_remedy(tmp_path: Path, damaged: str) -> None:
    root = package(tmp_path, "merged", ("kernel",))
    text = (root / damaged).read_text()
    (root / damaged).write_text(f"<<<<<<< ours\n{text}=======\n{text}>>>>>>> theirs\n")
    with pytest.raises(InvalidInputError, match=rf"as it was built; .*{damaged}.*nsagen build"):
        nsagen.load("merged")


def test_threads_that_load_a_package_at_once_get_it_whole(tmp_path: Path) -> None:
    root = package(tmp_path, "slow", ("kernel",))
    text = (root / "dispatcher.py").read_text()
    (root / "dispatcher.py").write_text(f"import time\ntime.sleep(0.1)\n{text}")
    found = at_once(8, lambda: nsagen.load("slow"))
    assert found == [found[0]] * 8
    strict = at_once(8, lambda: nsagen.load("slow", on_missing="error"))
    assert strict == [strict[0]] * 8


def test_places_that_cannot_be_looked_into_hold_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the path, a folder that this user may not read fails like a name that is too long."""
    monkeypatch.syspath_prepend("x" * 300)
    package(tmp_path, "readable", ("kernel",))
    assert nsagen.load("readable").name == "readable"
    with pytest.raises(InvalidInputError, match="must be built first"):
        nsagen.load("y" * 300)


def test_a_working_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "lib", "elsewhere", ("kernel",))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert nsagen.load("elsewhere").name == "elsewhere"
    with pytest.raises(InvalidInputError, match="must be built first"):
        nsagen.load("nowhere")
    monkeypatch.chdir(tmp_path)


def test_a_process_forked_while_a_kernel_is_looked_up_can_look_one_up() -> None:
    held, forked = threading.Event(), threading.Event()

    def look_up() -> None:
        with LOCK:
            held.set()
            forked.wait(0.2)

    thread = threading.Thread(target=look_up)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if LOCK.acquire(timeout=5) else 1)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_forked_while_a_package_is_imported_can_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "generated" / "slow_one"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import time\nfrom nsagen.runtime.dispatcher import Dispatcher\ntime.sleep(0.2)\n"
        "dispatcher = Dispatcher(__name__, __name__ + '.kernels', {})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=nsagen.load, args=("slow_one",))
    thread.start()
    while not any("slow_one" in name for name in list(sys.modules)):
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends a child that waits forever
        nsagen.load("slow_one")
        os._exit(0)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_does_not_wait_for_the_imports_of_its_own_thread() -> None:
    with complete_before_forks():
        child = os.fork()
        if child == 0:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
