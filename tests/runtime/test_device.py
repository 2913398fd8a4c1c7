from types import SimpleNamespace

import pytest
import torch

from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.runtime import device


@pytest.fixture(autouse=True)
def _no_cache() -> None:
    device._target_of_index.cache_clear()
    device._slug_of_index.cache_clear()


def test_cuda_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert device.target_of(torch.device("cuda", 3)) == "cuda:90"
    device._target_of_index.cache_clear()


def test_hip_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert device.target_of(torch.device("cuda", 0)) == "hip:gfx942"
    device._target_of_index.cache_clear()


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedWorkloadError, match="got meta"):
        device.target_of(torch.device("meta"))


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("AMD Instinct MI300X (gfx942)", "amd-instinct-mi300x-gfx942"),
    ],
)
def test_slugs(name: str, slug: str) -> None:
    assert device.slug(name) == slug


@pytest.mark.parametrize("value", [None, "", "0", "off", "1", "true", "TRUE", "on", "yes", "y"])
def test_the_interpreter_is_on_where_triton_says_so(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    getenv_bool = pytest.importorskip("triton._C.libtriton").getenv_bool
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert device.interpreting() == getenv_bool("TRITON_INTERPRET", False)
