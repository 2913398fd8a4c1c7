"""What makes Triton another compiler: its version, and settings of the environment."""

import os

import pytest
import triton

from nsagen.core.compiler import compiler_name, compiler_settings


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
        "DISABLE_LLVM_OPT",
        "TRITON_DEBUG",
        "TRITON_DEFAULT_FP_FUSION",
        "TRITON_INSTRUMENTATION_MODE",
        "TRITON_OVERRIDE_ARCH",
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
