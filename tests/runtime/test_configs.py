"""Tuned kernels of devices, from the JSON files of an exported package."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsagen.core.bucket import Bucket
from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.workload import Workload
from nsagen.runtime import dispatcher as dispatching
from nsagen.runtime.configs import read_configs
from nsagen.runtime.dispatcher import DEFAULT, Dispatcher, lookup, use_by_default

ROPE = Workload.of("rope", "forward", dtype="float16", head_dim=32)
ENTRY: dict[str, Any] = {
    "op": "rope",
    "pass": "forward",
    "dtype": "float16",
    "params": {"head_dim": 32},
    "tokens": [None, 100],
    "context": [None, None],
    "kernel": "fast",
    "evidence": "for readers",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "fast.py").write_text("launch = 'fast'\n")
    (tmp_path / "configs").mkdir()
    return tmp_path / "configs"


def write(folder: Path, **changes: Any) -> None:
    content = {"device": "nvidia-a100", "entries": [{**ENTRY, **changes}]}
    (folder / "nvidia-a100.json").write_text(json.dumps(content))


def test_a_package_without_any_has_none(tmp_path: Path) -> None:
    assert read_configs(tmp_path / "configs") == {}


def test_an_entry_names_a_workload_its_sizes_and_a_kernel(folder: Path) -> None:
    write(folder)
    assert read_configs(folder) == {"nvidia-a100": {ROPE: ((Bucket(tokens=(None, 100)), "fast"),)}}


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "missing"},
        {"kernel": "../fast"},
        {"kernel": 3},
        {"tokens": [5]},
        {"tokens": [9, 5]},
        {"tokens": ["a", None]},
        {"op": "nothing"},
        {"params": {"head": 32}},
        {"params": []},
    ],
)
def test_what_nsagen_would_not_write_is_refused_by_name(
    folder: Path, changes: dict[str, Any]
) -> None:
    write(folder, **changes)
    with pytest.raises(InvalidInputError, match=r"nvidia-a100\.json: must list tuned kernels"):
        read_configs(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"device": "x"}', '{"device": 1, "entries": []}']
)
def test_another_file_is_refused_by_name(folder: Path, text: str) -> None:
    (folder / "a.json").write_text(text)
    with pytest.raises(InvalidInputError, match=r"a\.json: must list tuned kernels"):
        read_configs(folder)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The device that GPU calls are on, as far as the dispatcher sees."""
    device = SimpleNamespace(slug="nvidia-a100")
    monkeypatch.setattr(dispatching, "target_of", lambda _: "cuda:80")
    monkeypatch.setattr(dispatching, "device_slug", lambda _: device.slug)
    modules = {f"package.kernels.{n}": SimpleNamespace(launch=n) for n in ("fast", "usual")}
    monkeypatch.setattr(dispatching.importlib, "import_module", modules.__getitem__)
    return device


def test_a_devices_own_kernel_comes_before_its_architectures(folder: Path, on_gpu: Any) -> None:
    write(folder)
    table = {ROPE: {"cuda:80": ((Bucket(), "usual"),)}}
    for slug, tokens, expected in (
        ("nvidia-a100", 100, "fast"),
        ("nvidia-a100", 101, "usual"),
        ("nvidia-a800", 100, "usual"),
    ):
        on_gpu.slug = slug
        made = Dispatcher("one", "package.kernels", table, "error", devices=read_configs(folder))
        device: Any = torch.device("cuda", 0)
        assert made.launcher(ROPE, device, tokens) == expected
        assert made.with_on_missing("build").launcher(ROPE, device, tokens) == expected


def test_calls_that_name_no_dispatcher_use_the_one_that_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatching, "_dispatchers", dict(dispatching._dispatchers))
    made = Dispatcher("one", "package.kernels", {}, "error")
    use_by_default(made)
    assert lookup(DEFAULT) is made
    monkeypatch.setattr(dispatching, "target_of", lambda _: "cuda:80")
    with pytest.raises(UnsupportedWorkloadError):
        lookup(DEFAULT).launcher(ROPE, torch.device("cuda", 0), 1)
