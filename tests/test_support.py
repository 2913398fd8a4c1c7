"""What tests share."""

from __future__ import annotations

from pathlib import Path

from nsagen.core.workload import Workload
from tests.support import load_kernel


def test_a_kernel_that_is_there_is_not_written_again() -> None:
    """Processes share the folder: one that reads must not find what another has just emptied."""
    work = Workload.of("rope", "forward", dtype="float32", head_dim=16)
    path = Path(load_kernel(work).__file__ or "")
    before = path.stat()
    load_kernel.cache_clear()
    load_kernel(work)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
