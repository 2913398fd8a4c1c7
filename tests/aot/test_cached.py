"""What was compiled once is not compiled again, and what changed is."""

import os

import pytest

from nsagen.aot import compile as compiling
from nsagen.aot.cached import compile_key, compiled_resources
from nsagen.aot.resources import Resources
from nsagen.core.paths import cache_dir
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Workload

WORKLOAD = Workload.of("rope", "forward", dtype="float16", head_dim=64)
SM80, SM90 = KNOWN_TARGETS["cuda:80"], KNOWN_TARGETS["cuda:90"]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel file, and a compiler that counts its calls."""
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "rope_one.py"
    path.write_text("# Source: 1\n\ndef rope_one(x):\n    return x\n")
    calls = []

    def compile_variant(path, workload, target):
        calls.append((path.stem, str(target)))
        return (Resources(path.stem, str(target), 40, 0, 1024, "none"),)

    monkeypatch.setattr(compiling, "compile_variant", compile_variant)
    return path, calls


def test_an_unchanged_kernel_is_compiled_once(kernel):
    path, calls = kernel
    first = compiled_resources(path, WORKLOAD, SM90)
    assert compiled_resources(path, WORKLOAD, SM90) == first
    assert calls == [("rope_one", "cuda:90")]
    compiled_resources(path, WORKLOAD, SM80)
    assert len(calls) == 2


def test_comments_and_the_name_do_not_count(kernel):
    path, calls = kernel
    compiled_resources(path, WORKLOAD, SM90)
    renamed = path.with_name("rope_two.py")
    renamed.write_text(path.read_text().replace("rope_one", "rope_two").replace(": 1", ": 2"))
    (resources,) = compiled_resources(renamed, WORKLOAD, SM90)
    assert resources.kernel == "rope_two"
    assert len(calls) == 1


def test_code_counts_and_so_does_the_version_of_triton(kernel, monkeypatch):
    path, _ = kernel
    key = compile_key(path, WORKLOAD, SM90)
    path.write_text(path.read_text().replace("return x", "return x + 1"))
    changed = compile_key(path, WORKLOAD, SM90)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert len({key, changed, compile_key(path, WORKLOAD, SM90)}) == 3


@pytest.mark.parametrize("text", ["", "[]x", "[{}]", "[]", "{}", "null", '[{"kernel": 3}]', "7"])
def test_a_damaged_memory_is_compiled_anew(kernel, text):
    path, calls = kernel
    right = compiled_resources(path, WORKLOAD, SM90)
    (memory,) = (cache_dir() / "compiled").iterdir()
    memory.write_text(text)
    assert compiled_resources(path, WORKLOAD, SM90) == right
    assert compiled_resources(path, WORKLOAD, SM90) == right
    assert len(calls) == 2


def test_an_edited_number_is_compiled_anew(kernel):
    path, calls = kernel
    right = compiled_resources(path, WORKLOAD, SM90)
    (memory,) = (cache_dir() / "compiled").iterdir()
    memory.write_text(memory.read_text().replace("40", '"many"'))
    assert compiled_resources(path, WORKLOAD, SM90) == right
    assert len(calls) == 2


def test_a_pipe_in_the_cache_is_not_waited_for(kernel):
    path, calls = kernel
    right = compiled_resources(path, WORKLOAD, SM90)
    (memory,) = (cache_dir() / "compiled").iterdir()
    memory.unlink()
    os.mkfifo(memory)
    assert compiled_resources(path, WORKLOAD, SM90) == right
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written_to_only_costs_time(kernel, tmp_path):
    path, calls = kernel
    (tmp_path / "cache").write_text("not a folder")
    assert compiled_resources(path, WORKLOAD, SM90) == compiled_resources(path, WORKLOAD, SM90)
    assert len(calls) == 2


def test_settings_of_the_compiler_count(kernel, monkeypatch):
    path, _ = kernel
    keys = {compile_key(path, WORKLOAD, SM90)}
    for name in ("DISABLE_LLVM_OPT", "TRITON_DEBUG", "TRITON_INSTRUMENTATION_MODE"):
        monkeypatch.setenv(name, "1")
        keys.add(compile_key(path, WORKLOAD, SM90))
        monkeypatch.delenv(name)
    assert len(keys) == 4
