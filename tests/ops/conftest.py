"""What tests of the ops share."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that a process of tests has built."""
    folder: Path = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(folder))
