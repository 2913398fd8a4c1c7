"""Compiling that ends after Triton's front end, for what that step alone finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from triton.compiler.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from nsagen.aot.compile import RecordedLaunch, compile_launch
from nsagen.core.errors import BuildError
from nsagen.core.target import Target


class _Accepted(Exception):
    """Raised in place of all steps after the front end."""


@pytest.fixture
def front_end_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def accepting(make_ir: Any) -> Any:
        def accept(*args: Any) -> None:
            make_ir(*args)
            raise _Accepted

        return accept

    for source in (ASTSource, GluonASTSource):
        monkeypatch.setattr(source, "make_ir", accepting(source.make_ir))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def check_accepted(call: RecordedLaunch, target: Target, name: str) -> None:
    """That Triton's front end takes a launch; for tests with `front_end_alone`."""
    with pytest.raises(BuildError) as stopped:
        compile_launch(call, target, name)
    assert isinstance(stopped.value.__cause__, _Accepted), stopped.value
