"""What makes Triton another compiler: its version, and settings of the environment."""

import os
from contextlib import closing
from pathlib import Path

import pytest
import triton

from nsagen.core.compiler import IN_ITS_PLACE, compiler_name, compiler_settings
from nsagen.core.target import parse_target
from nsagen.core.worker import Reply, Worker, _note_unseen
from nsagen.core.workload import Workload


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in compiler_settings():
        monkeypatch.delenv(name)


def test_the_version_alone_where_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files go and what is printed changes no kernel."""
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_PRINT_AUTOTUNING", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "/tmp/x")
    assert compiler_settings() == {}
    assert compiler_name().startswith(triton.__version__)
    assert " with " not in compiler_name()


@pytest.mark.parametrize(
    "name",
    [
        "AMDGCN_SCALARIZE_PACKED_FOPS",
        "DISABLE_LLVM_OPT",
        "PTXAS_OPTIONS",
        "TRITON_DEBUG",
        "TRITON_DEFAULT_FP_FUSION",
        "TRITON_INSTRUMENTATION_MODE",
        "TRITON_PTXAS_PATH",
        "TRITON_SETTING_OF_TOMORROW",
    ],
)
def test_a_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert list(compiler_settings()) == [name]
    assert f" with {name}=" in compiler_name()


def test_a_path_of_this_machine_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for path in ("/home/me/cuda/bin/ptxas", "/opt/ptxas"):
        monkeypatch.setenv("TRITON_PTXAS_PATH", path)
        names.add(compiler_name())
    assert len(names) == 2
    assert not any(os.sep in name for name in names)


@pytest.mark.parametrize("name", IN_ITS_PLACE)
def test_what_would_put_another_kernel_in_place_is_not_for_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A worker told to compile for one architecture must not do so for another."""
    _note_unseen.cache_clear()
    monkeypatch.setenv(name, "sm80")
    monkeypatch.setenv("TRITON_SEEN", "1")
    assert list(compiler_settings()) == ["TRITON_SEEN"]
    with closing(Worker("nsagen.core.worker:Caller")) as worker:
        for wanted in (name, "TRITON_SEEN"):
            reply = worker.ask("call", os.getenv, wanted, limit_s=60)
            assert reply == Reply(None if wanted == name else "1")
    told = [] if name == "TRITON_INTERPRET" else [name]
    assert [line.partition(":")[0] for line in caplog.messages] == told


def test_a_file_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another ptxas in the place of one compiles otherwise; the same one elsewhere does not."""
    names = []
    for place, content in (("a", "1"), ("a", "2 "), ("b", "2 ")):
        (tmp_path / place).write_text(content)
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / place))
        names.append(compiler_name())
    assert names[0] != names[1] == names[2]


def test_the_compile_cache_is_keyed_by_all_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nsagen.aot.cached import compile_key

    kernel = tmp_path / "kernel.py"
    kernel.write_text("def launch(): ...\n")
    known = Workload.of("rope", "forward", dtype="float32", head_dim=16), parse_target("cuda:90")
    keys = {compile_key(kernel, *known)}
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    assert compile_key(kernel, *known) in keys
    monkeypatch.setenv("PTXAS_OPTIONS", "-O0")
    assert compile_key(kernel, *known) not in keys
