import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsagen import __version__
from nsagen.core.errors import BuildError, UnsupportedWorkloadError
from nsagen.core.files import sealed
from nsagen.core.workload import Workload
from nsagen.runtime import Dispatcher
from nsagen.runtime import user_cache as cache

from .conftest import KERNEL, at_once, selected

GPU = torch.device("cuda", 0)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stands in for the generating side; lists the (workload, target) pairs that it built."""
    done: list[tuple[str, str]] = []

    def build_variant(workload: Workload, target: str, out_dir: Path) -> Path:
        if workload.head_dim == 256:
            raise BuildError("templates/x: cannot do that")
        done.append((str(workload), target))
        path = out_dir / f"{workload.op}_{workload.pass_}__{workload.label}__0123abcd.py"
        path.write_text(sealed(KERNEL))
        return path

    fake = SimpleNamespace(build_variant=build_variant)
    monkeypatch.setitem(sys.modules, "nsagen.codegen.build", fake)
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
    return done


def test_a_miss_builds_once_and_logs_one_line(
    builds: list[tuple[str, str]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    dispatcher = Dispatcher("missing", "", {})
    with caplog.at_level(logging.INFO, "nsagen.runtime"):
        for _ in range(3):
            log: list[str] = []
            dispatcher.launcher(selected(), GPU, 7)(log)
            assert log[0].endswith("0123abcd")
    assert builds == [("selected_attention forward f16_d64_g4_b64", "cuda:90")]
    assert len(caplog.records) == 1
    assert "missing: selected_attention forward f16_d64_g4_b64 for cuda:90" in caplog.text
    (path,) = (tmp_path / "cache").rglob("*.py")
    assert path.parent.name.startswith("cuda-90-triton-")
    assert path.parent.parent.name.startswith(f"{__version__}-")


def test_another_process_finds_it_built(
    builds: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # a new dispatcher knows nothing of what an earlier one built
        Dispatcher("again", "", {}).launcher(selected(), GPU, 7)
    assert len(builds) == len(caplog.records) == 1


def test_threads_that_miss_a_kernel_at_once_build_it_once_and_get_it_whole(
    builds: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.runtime.test_user_cache.KERNEL", f"import time\ntime.sleep(0.1)\n{KERNEL}"
    )
    dispatcher = Dispatcher("threads", "", {})
    found = at_once(8, lambda: dispatcher.launcher(selected(), GPU, 7))
    assert found == [found[0]] * 8
    assert len(builds) == 1


def test_labels_that_begin_alike_are_not_confused(builds: list[tuple[str, str]]) -> None:
    with_pe = {"compress_type": "avgpool", "head_dim": 64, "kernel_size": 32, "kernel_stride": 16}
    for pe in (True, False):
        workload = Workload.of("compress", "forward", dtype="float16", with_pe=pe, **with_pe)
        cache.cached_variant(workload, "cuda:90", "test")
    assert len(builds) == 2


def test_another_triton_has_kernels_of_its_own(
    builds: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for release in ((3, 9), (4, 0), None):
        monkeypatch.setattr(cache, "installed_release", lambda release=release: release)
        found.add(cache.cached_variant(selected(), "cuda:90", "test").parent.name)
    assert found == {"cuda-90-triton-3.9", "cuda-90-triton-4.0", "cuda-90-triton-unknown"}


@pytest.mark.parametrize("edited", ["templates/x.py.j2", "codegen/spaces/x.py"])
def test_an_edit_of_what_generates_starts_a_new_folder(
    edited: str, builds: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "templates_dir", lambda: tmp_path / "templates")
    monkeypatch.setattr(cache, "_CODEGEN", tmp_path / "codegen")
    (tmp_path / edited).parent.mkdir(parents=True)
    for text in ("a", "b"):
        (tmp_path / edited).write_text(text)
        cache._generator_hash.cache_clear()
        cache.cached_variant(selected(), "cuda:90", "test")
    cache._generator_hash.cache_clear()
    assert len(builds) == 2


def test_a_failed_build_names_the_workload(builds: list[tuple[str, str]]) -> None:
    with pytest.raises(UnsupportedWorkloadError, match=r"(?s)cannot do that.*head_dim: 256"):
        Dispatcher("failing", "", {}).launcher(selected(head_dim=256), GPU, 7)


@pytest.mark.parametrize(
    ("target", "built_for"), [("cuda:103", "cuda:100"), ("cuda:87", "cuda:86")]
)
def test_an_unknown_gpu_takes_its_predecessors_default(
    builds: list[tuple[str, str]], target: str, built_for: str
) -> None:
    cache.cached_variant(selected(), target, "test")
    assert builds[0][1] == built_for


@pytest.mark.parametrize("target", ["cuda:70", "hip:gfx90a", "xpu:1"])
def test_a_gpu_older_than_any_known_is_refused(builds: list[tuple[str, str]], target: str) -> None:
    with pytest.raises(UnsupportedWorkloadError, match="known: cuda:80"):
        cache.cached_variant(selected(), target, "test")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.delenv("NSAGEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "nsagen"
