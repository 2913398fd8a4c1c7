"""Kernels of the user cache: never half of one, and a damaged one is built again."""

import itertools
import logging
from pathlib import Path

import pytest
import torch

from nsagen.core.files import is_whole, sealed
from nsagen.core.workload import Workload
from nsagen.runtime import Dispatcher
from nsagen.runtime import user_cache as cache
from tests.bad.support import contents
from tests.faults.support import killed_at
from tests.one_op import one_op

__all__ = ["one_op"]  # a fixture

WORKLOAD = Workload.of("gated_sum", "forward", dtype="float32", v_head_dim=32)


@pytest.fixture(autouse=True)
def _cache_of_its_own(one_op: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(one_op / "cache"))


def built() -> Path:
    return cache.cached_variant(WORKLOAD, "cuda:90", "test")


def test_a_file_cut_anywhere_or_changed_is_built_again(caplog: pytest.LogCaptureFixture) -> None:
    path = built()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    cuts = [b"".join(lines[:count]) for count in range(0, len(lines), 4)]
    others = [
        b"",
        whole[:-1],
        whole[:-40],
        whole + b"x = 1\n",
        whole.replace(b"+=", b"-="),
        b"\xff",
    ]
    for damaged in [*cuts, *others]:
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nsagen.runtime"):
            assert built() == path
        assert path.read_bytes() == whole
        assert [record.message.split()[2] for record in caplog.records] == ["is", "forward"]


def test_a_cut_kernel_is_not_what_a_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after its first lines, a launch would be valid Python that does nothing."""
    path = built()
    whole = path.read_text()
    start = whole.index("def launch")
    end = whole.index("    grid", start)
    path.write_text(whole[:end] + "    return\n")
    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
    launch = Dispatcher("cut", "", {}).launcher(WORKLOAD, torch.device("cuda", 0), 1)
    assert "grid" in launch.__code__.co_varnames
    assert path.read_text() == whole


def test_killed_while_writing(one_op: Path) -> None:
    for step in itertools.count():
        if not killed_at(step, built):
            break
        assert not list((one_op / "cache").rglob("*.py"))
    assert step == 1
    assert [is_whole(path) for path in (one_op / "cache").rglob("*.py")] == [True]


def test_no_room(one_op: Path) -> None:
    (one_op / "cache").touch()
    with pytest.raises(
        LookupError, match=r"building it failed: .*(Not a directory|File exists)"
    ) as raised:
        built()
    assert f"must be able to write {one_op / 'cache'}" in str(raised.value)
    assert "set NSAGEN_CACHE_DIR" in str(raised.value)
    assert "add to the spec" not in str(raised.value)
    assert contents(one_op)["cache"] == b""


def test_the_seal_covers_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    text = sealed("x = 1\n")
    for i in range(len(text)):
        path.write_text(text[:i] + chr(ord(text[i]) ^ 1) + text[i + 1 :])
        assert not is_whole(path)
    path.write_text(text)
    assert is_whole(path)
